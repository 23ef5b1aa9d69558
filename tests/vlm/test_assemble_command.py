"""The command: what it prints, and one clear line for everything that does not fit, with nothing left on the disk."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import NVIDIA_MARKS, small_decoder, small_tokenizer, write_internvit, write_nvidia

from vlm.assemble import main
from vlm.checkpoint import load_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    tokenizer, root = small_tokenizer(), tmp_path_factory.mktemp("checkpoints")
    return write_nvidia(root / "decoder", small_decoder(tokenizer), tokenizer), write_internvit(root / "encoder", shards=2)


@pytest.fixture
def copies(checkpoints, tmp_path):
    """(decoder's folder, encoder's folder, a folder for results), free to damage."""
    decoder, encoder = tmp_path / "in" / "decoder", tmp_path / "in" / "encoder"
    shutil.copytree(checkpoints[0], decoder)
    shutil.copytree(checkpoints[1], encoder)
    (tmp_path / "results").mkdir()
    return decoder, encoder, tmp_path / "results"


def run(decoder, encoder, results, *more):
    return main(["--language-model", str(decoder), "--vision-checkpoint", str(encoder), "--out", str(results / "model"), *more])


def test_it_prints_the_parts_and_their_parameters(copies, capsys):
    assert run(*copies, "--preset", "8b") == 0
    out, err = capsys.readouterr()
    model, _ = load_model(copies[2] / "model")
    for name, count in model.parameter_counts().items():
        assert f"{name} {count:>15,} parameters" in out
    rows = model.config.text_config.vocab_size
    assert "16 (<image>, <Image>, </Image>, <tile_01> ...); embeddings " in out and f"-> {rows:,} rows" in out
    assert "decoder in bfloat16" in out
    assert "not that of 8b: hidden_size 64 (not 4096)" in err


def test_there_and_back_through_the_command(copies, capsys):
    decoder, encoder, results = copies
    assert run(*copies) == 0
    assert main(["--model", str(results / "model"), "--to-language-model", str(results / "decoder")]) == 0
    assert "in the format it came from" in capsys.readouterr().out
    for path in decoder.glob("*.safetensors"):
        expected, found = load_file(path), load_file(results / "decoder" / path.name)
        assert expected.keys() == found.keys() and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wide_class_token(encoder):
    path = encoder / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    save_file(weights | {"embeddings.class_embedding": torch.ones(1, 1, 48)}, path)


def tokenizer_of(decoder, marks):
    for path in decoder.glob("tokenizer*"):
        path.unlink()
    small_tokenizer(marks).save_pretrained(decoder)


SECOND, ENCODER_SECOND = "model-00002-of-00003.safetensors", "model-00002-of-00002.safetensors"
FAULTS = {
    "truncated decoder": (lambda d, e: truncate(d / SECOND), (), f"{SECOND} is damaged or truncated"),
    "missing shard": (lambda d, e: (d / SECOND).unlink(), (), f"lacks 1 of 3 shards: {SECOND}"),
    "garbage shard": (lambda d, e: (d / SECOND).write_bytes(b"no weights"), (), f"{SECOND} is damaged or truncated"),
    "truncated encoder": (lambda d, e: truncate(e / ENCODER_SECOND), (), f"{ENCODER_SECOND} is damaged or truncated"),
    "missing encoder shard": (lambda d, e: (e / ENCODER_SECOND).unlink(), (), "holds 1 of 2 shards"),
    "another model's config": (lambda d, e: change_json(d / "config.json", model_type="llama"), (), "type 'llama'; expected 'nemotron_h'"),
    "config of another size": (
        lambda d, e: change_json(d / "config.json", hidden_size=128),
        (),
        "of another shape: .*backbone.embeddings.weight \\(file \\(\\d+, 64\\), model \\(\\d+, 128\\)\\)",
    ),
    "config of other layers": (
        lambda d, e: change_json(d / "config.json", hybrid_override_pattern="MM*-M"),
        (),
        "missing: backbone.layers.1.mixer.A_log",
    ),
    "config is no JSON": (lambda d, e: (d / "config.json").write_text("{"), (), "config.json is not valid JSON"),
    "encoder's weights of another width": (
        lambda d, e: wide_class_token(e),
        (),
        "cls_token \\(file \\(1, 1, 48\\), model \\(1, 1, 24\\)\\)",
    ),
    "encoder's config of another width": (
        lambda d, e: change_json(e / "config.json", hidden_size=48, num_attention_heads=6),
        (),
        "of another shape: .*cls_token",
    ),
    "setting of another width": (lambda d, e: None, ("--vision-setting", "hidden_size=48"), "hidden_size=48 contradicts"),
    "shuffle that does not divide": (lambda d, e: None, ("--pixel-shuffle-factor", "3"), "4 x 4 features, which a pixel shuffle of 3"),
    "unknown encoder": (lambda d, e: None, ("--vision-encoder", "internvitt"), "did you mean 'internvit'"),
    "no tokenizer": (lambda d, e: [path.unlink() for path in d.glob("tokenizer*")], (), "has no tokenizer"),
    "tokenizer is no JSON": (lambda d, e: (d / "tokenizer.json").write_text("{"), (), "tokenizer in .* cannot be opened"),
    "tokenizer of a larger model": (
        lambda d, e: tokenizer_of(d, [*NVIDIA_MARKS, *(f"<extra_{number}>" for number in range(64))]),
        (),
        "belongs to another model",
    ),
    "tokenizer without the token texts begin with": (
        lambda d, e: tokenizer_of(d, ["<unk>", "<begin>", "</s>", "<SPECIAL_14>", "<SPECIAL_15>"]),
        (),
        "lacks '<s>'",
    ),
    "corpus beside a tokenizer": (lambda d, e: None, ("--tokenizer-corpus", "x.txt"), "its own is used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(copies, capsys, fault):
    """Half a folder looks like a model: nothing may stand at --out or beside it, and an older model stays as it was."""
    damage, options, message = FAULTS[fault]
    damage(*copies[:2])
    assert run(*copies, *options) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("assemble: ") and "Traceback" not in error
    import re

    assert re.search(message, error), error
    assert list(copies[2].iterdir()) == []


def test_an_older_model_survives_a_failure(copies, capsys):
    decoder, encoder, results = copies
    assert run(*copies) == 0
    before = (results / "model" / "model.safetensors").read_bytes()
    truncate(decoder / SECOND)
    assert run(*copies) == 2
    assert (results / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in results.iterdir()] == ["model"]


@pytest.mark.parametrize("moment", ["weights", "settings"])
def test_a_failure_while_writing_leaves_nothing(copies, capsys, monkeypatch, moment):
    """The disk fills up half way."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "weights":
        monkeypatch.setattr("vlm.shard_files.os.fsync", fail)
    else:
        monkeypatch.setattr("vlm.checkpoint.model_card", fail)
    assert run(*copies) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(copies[2].iterdir()) == []


def test_a_disk_without_room_is_noticed_before_writing(copies, capsys, monkeypatch):
    usage = shutil.disk_usage(copies[2])
    monkeypatch.setattr("vlm.assemble.streaming.shutil.disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("vlm.assemble.streaming.write_shards", lambda *_: pytest.fail("wrote all the same"))
    assert run(*copies) == 2
    assert "the disk has 0 MB free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny"], "give --out and --preset or --language-model"),
        (["--out", "x"], "give --out and --preset or --language-model"),
        (["--model", "x"], "belong together"),
        (["--model", "nowhere", "--to-language-model", "y"], "nowhere has no config.json"),
        (["--preset", "tiny", "--out", "x", "--vision-setting", "depth"], "expected key=value"),
        (["--preset", "tiny", "--out", "x", "--tokenizer-corpus", "nowhere.txt"], "no tokenizer corpus at nowhere.txt"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
