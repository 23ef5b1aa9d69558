"""The golden pack: what is the same passes in any dtype; each kind of drift is caught and called by its name."""

import copy
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import vlm.golden.drift as drift_module
import vlm.golden.pack as pack_module
from vlm import golden
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model
from vlm.engine import Engine, Request
from vlm.golden.__main__ import main
from vlm.golden.numbers import distance, run_stages, summarize
from vlm.golden.pictures import PLANS, draw
from vlm.processing import VLMProcessor

NAMES = [
    "settings",
    "grids",
    "tile pixels",
    "tile order",
    "normalised pixels",
    "token ids",
    "vision features",
    "visual tokens",
    "first logits",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its pack, larger weights so that logits are far apart."""
    model, processor = assemble("tiny", seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
    return save_model(model, processor, tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture
def own(folder, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(folder, tmp_path / "model")


def drifted(model, processor, folder, **settings):
    return [name for name, _, ok in golden.check(model, processor, folder, **settings) if not ok]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_saved_model_passes_everything_it_wrote(folder):
    findings = golden.check(*load_model(folder), folder)
    assert [name for name, _, _ in findings] == NAMES and all(ok for _, _, ok in findings), findings
    assert "in 12 of 12" in findings[-1][1]


def test_the_pack_holds_what_was_promised_and_is_small(folder):
    pack = json.loads((folder / "golden" / "pack.json").read_text())
    assert len(pack["pictures"]) == 12 and pack["dtype"] == "float32"
    for entry in pack["pictures"]:
        assert len(entry["pixel_sha256"]) == 64 and len(entry["ids"]) > 20 and len(entry["tile_digests"]) == entry["tiles"]
        assert len(entry["numbers"]["first logits"]["values"]) == 8 and entry["why_no_numbers"] is None
    assert len({tuple(entry["grid"]) for entry in pack["pictures"]}) >= 8 and max(entry["tiles"] for entry in pack["pictures"]) == 7
    assert sum(path.stat().st_size for path in (folder / "golden").iterdir()) < 100_000


def test_pictures_are_drawn_the_same_every_time_and_no_two_are_alike():
    """Fixed for good: were the drawing to change, old packs would still hold (they carry their pictures), but no two could be compared."""
    drawn = [np.asarray(draw(number)) for number in range(len(PLANS))]
    assert all(np.array_equal(once, draw(number)) for number, once in enumerate(drawn))
    assert len({once.tobytes() for once in drawn}) == 12
    assert {draw(number).mode for number in range(12)} == {"RGB", "RGBA", "L", "P"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_no_drift(folder, dtype):
    assert drifted(*load_model(folder, dtype=dtype), folder) == []


@pytest.mark.parametrize(("key", "value"), [("image_mean", [0.5, 0.456, 0.406]), ("image_std", [0.229, 0.224, 0.25])])
def test_another_normalisation_is_named(own, key, value):
    path = own / "processor_config.json" if not (own / "preprocessor_config.json").is_file() else own / "preprocessor_config.json"
    edit(path, lambda content: (content if key in content else content["image_processor"]).__setitem__(key, value))
    model, processor = load_model(own)
    assert drifted(model, processor, own) == ["settings", "normalised pixels"]
    with pytest.raises(ValueError, match=rf"settings \({key} is \[0.*was \[0.*normalised pixels \(12 of 12 differ"):
        Engine.from_pretrained(own)


def test_a_normalisation_that_computes_otherwise_is_named(folder, monkeypatch):
    """The settings are the old ones; the code is not."""
    model, processor = load_model(folder)
    normalize = processor.image_processor.normalize_pixels
    monkeypatch.setattr(processor.image_processor, "normalize_pixels", lambda pixels: normalize(pixels.flip(-1)))
    assert drifted(model, processor, folder) == ["normalised pixels"]


def test_tiles_in_another_order_are_named(folder, monkeypatch):
    """Column by column instead of row by row: the same tiles, and the picture is garbage."""
    model, processor = load_model(folder)
    tile = processor.image_processor.tile

    def thumbnail_first(image, max_tiles=None):
        tiles = tile(image, max_tiles)
        return tiles[-1:] + tiles[:-1]

    monkeypatch.setattr(processor.image_processor, "tile", thumbnail_first)
    assert drifted(model, processor, folder) == ["tile order"]


def test_another_resampling_is_named(folder, monkeypatch):
    model, processor = load_model(folder)
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest, **more: resize(self, size, Image.Resampling.BILINEAR))
    assert "tile pixels" in drifted(model, processor, folder) and "tile order" not in drifted(model, processor, folder)


def test_another_rule_of_grids_is_named(folder):
    model, processor = load_model(folder)
    processor.image_processor.policy, processor.image_processor.max_tiles = "area_weighted", 12
    findings = {name: (figure, ok) for name, figure, ok in golden.check(model, processor, folder)}
    assert not findings["grids"][1] and "max_tiles is 12, was 6" in findings["settings"][0]
    assert findings["first logits"] == ("not compared, for what goes into the model differs already", True)


def test_another_tokenizer_is_named(own):
    """Two words change places in the vocabulary: every text still encodes, nothing raises."""

    def swap(content):
        words = content["model"]["vocab"]
        first, second = "1", "2"
        words[first], words[second] = words[second], words[first]

    edit(own / "tokenizer.json", swap)
    findings = {name: (figure, ok) for name, figure, ok in golden.check(*load_model(own), own)}
    assert [name for name, (_, ok) in findings.items() if not ok] == ["token ids"]
    assert "at position" in findings["token ids"][0]


@pytest.mark.parametrize(
    ("part", "first"),
    [("vision_encoder", "vision features"), ("projector", "visual tokens"), ("language_model.model.layers.0", "first logits"),
     ("language_model.lm_head", "first logits")],
)  # fmt: skip
def test_changed_weights_are_named_by_where_numbers_first_move(folder, part, first):
    """One matrix of the part, the largest, by 5 %."""
    model, processor = load_model(folder)
    with torch.no_grad():
        max(model.get_submodule(part).parameters(), key=torch.numel).mul_(1.05)
    found = drifted(model, processor, folder)
    assert found and found[0] == first and set(found) <= set(NAMES[6:])
    assert drifted(model, processor, folder, quick=True)


def test_rows_of_the_vocabulary_that_changed_places_are_found(folder):
    model, processor = load_model(folder)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(head.roll(1, dims=0))
    assert drifted(model, processor, folder) == ["first logits"]


def test_loading_refuses_warns_or_does_not_look(own):
    with torch.no_grad():
        model, processor = load_model(own)
        model.projector.linear_2.weight.mul_(1.5)
    pack = (own / "golden" / "pack.json").read_text()
    save_model(model, processor, own)
    (own / "golden" / "pack.json").write_text(pack)
    with pytest.raises(ValueError, match="is not what it was when it was saved: visual tokens .*--write"):
        Engine.from_pretrained(own)
    with pytest.warns(UserWarning, match="visual tokens"):
        engine = Engine.from_pretrained(own, on_drift="warn")
    assert "DRIFTED: visual tokens" in engine.golden_note
    assert engine.generate([Request([{"role": "user", "content": "still there?"}], max_new_tokens=2)])[0].error is None
    assert Engine.from_pretrained(own, on_drift="ignore").golden_note == "golden pack: not looked at"
    with pytest.raises(ValueError, match="on_drift is 'maybe'; expected one of refuse, warn, ignore"):
        Engine.from_pretrained(own, on_drift="maybe")


def test_what_has_not_drifted_says_so(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "first logits" in Engine.from_pretrained(folder).golden_note


def test_other_versions_are_told_with_the_drift(own):
    edit(own / "golden" / "pack.json", lambda pack: pack["versions"].update(pillow="1.2.3") or pack["settings"].update(tile_size=65))
    with pytest.raises(ValueError, match=r"tile_size is 64, was 65.*made with pillow 1\.2\.3 \(here "):
        Engine.from_pretrained(own)


def test_a_folder_without_a_pack_gets_a_note(own):
    shutil.rmtree(own / "golden")
    assert Engine.from_pretrained(own).golden_note == f"golden pack: pack none in {own}: not checked for drift"


@pytest.mark.parametrize("spoil", ["half a json", "no picture", "another format"])
def test_a_damaged_pack_is_refused_and_named(own, spoil):
    pack = own / "golden" / "pack.json"
    if spoil == "half a json":
        pack.write_text(pack.read_text()[:300])
    elif spoil == "no picture":
        (own / "golden" / "03.png").unlink()
    else:
        edit(pack, lambda content: content.update(format=99))
    with pytest.raises(ValueError, match="pack"):
        Engine.from_pretrained(own)


def test_without_a_model_the_pack_holds_all_but_its_numbers(folder, tmp_path):
    _, processor = load_model(folder)
    golden.write(None, processor, tmp_path, reason="nobody was there")
    findings = golden.check(*load_model(folder), tmp_path)
    assert [name for name, _, _ in findings] == [*NAMES[:6], "first logits"]
    assert findings[-1] == ("first logits", "none in the pack: nobody was there", True)
    assert [name for name, _, _ in golden.check(None, processor, tmp_path)] == NAMES[:6]


def test_weights_without_finite_numbers_are_saved_with_a_note(tiny, tmp_path):
    """The checkpoint that an autopsy saves."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():
        model.language_model.lm_head.weight.fill_(float("nan"))
    pack = json.loads((save_model(model, processor, tmp_path / "model") / "golden" / "pack.json").read_text())
    assert {entry["why_no_numbers"] for entry in pack["pictures"]} == {"the model gave numbers that are not finite"}


def test_a_model_too_large_for_the_machine_keeps_the_cheapest_picture(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "WRITING_OPERATIONS", {"cpu": 1.0})
    pack = json.loads(golden.write(*tiny, tmp_path).read_text())
    kept = [entry for entry in pack["pictures"] if entry["numbers"]]
    assert len(kept) == 1 and kept[0]["tiles"] == 1
    assert all("operations were too many on cpu" in entry["why_no_numbers"] for entry in pack["pictures"] if not entry["numbers"])
    assert "in 1 of 12" in golden.check(*tiny, tmp_path)[-1][1]


def test_loading_looks_at_no_more_than_its_budget(folder, monkeypatch):
    model, processor = load_model(folder)
    monkeypatch.setattr(drift_module, "QUICK_OPERATIONS", {"cpu": 1.0})
    assert "in 1 of 12" in golden.check(model, processor, folder, quick=True)[-1][1]
    assert "in 12 of 12" in golden.check(model, processor, folder)[-1][1]


def test_weights_given_apart_are_what_the_pack_is_of(tiny, tmp_path):
    """ZeRO gathers them; the model's own are in another dtype or in pieces."""
    weights = {name: tensor * 1.5 if tensor.ndim >= 2 else tensor for name, tensor in tiny[0].state_dict().items()}
    folder = save_model(*tiny, tmp_path / "model", state_dict=weights)
    assert drifted(*load_model(folder), folder) == []
    assert drifted(*tiny, folder)[0] == "vision features"


def test_writing_leaves_the_model_as_it_was(tiny, tmp_path):
    model = tiny[0]
    model.train()
    model.vision_encoder.eval()
    state = torch.get_rng_state()
    golden.write(*tiny, tmp_path)
    assert model.training and not model.vision_encoder.training and model.projector.training
    assert torch.equal(state, torch.get_rng_state())
    assert not model.vision_encoder._forward_hooks and not model.projector._forward_hooks
    model.eval()


def test_the_distance_counts_values_places_maximum_and_size(tiny):
    values = torch.arange(100, dtype=torch.float64)
    (kept,) = summarize({"vision features": values}).values()
    assert distance(kept, values) < 1e-8
    for other in (values.roll(1), values[:99], values.clone().index_fill_(0, torch.tensor([50]), 200.0), values * float("nan")):
        assert distance(kept, other) > 0.02
    assert summarize({"first logits": values * float("inf")}) is None


def test_the_command_checks_and_renews(own, capsys):
    assert main([str(own)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 9
    edit(own / "golden" / "pack.json", lambda pack: pack["settings"].update(max_tiles=3))
    assert main([str(own)]) == 1
    assert "FAIL  settings           max_tiles is 6, was 3" in capsys.readouterr().out
    assert main([str(own), "--write"]) == 0 and "12 of them with logits" in capsys.readouterr().out
    assert main([str(own)]) == 0
    assert main([str(own / "nowhere")]) == 2


def test_the_stages_are_those_of_a_plain_forward_pass(tiny):
    model, processor = tiny
    prepared = processor.prepare([{"role": "user", "content": [{"type": "image", "image": draw(3)}]}], add_generation_prompt=True)
    pixels = processor.image_processor.normalize_pixels(prepared.pixels)
    stages = run_stages(model, prepared.rendered.input_ids, pixels)
    with torch.no_grad():
        features = model.vision_encoder(pixels)
        logits = model(input_ids=torch.tensor([prepared.rendered.input_ids]), pixel_values=pixels).logits[0, -1]
    assert torch.equal(stages["vision features"].float(), features.flatten())
    assert torch.allclose(stages["first logits"].float(), logits, atol=1e-6)
    assert isinstance(processor, VLMProcessor)
