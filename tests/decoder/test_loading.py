"""Loading a decoder: both formats, any number of shards, every weight bit for bit, and a clear error for each kind of damage.

Checkpoints are written by hand in NVIDIA's layout (`backbone.`, one entry per expert) from a model built here.
"""

import json
import math

import pytest
import torch
from nvidia_layout import MIXTURE, nvidia_config, nvidia_weights
from safetensors.torch import save_file
from transformers import NemotronHForCausalLM

from vlm.decoder.loading import load_language_model, read_config
from vlm.decoder.presets import preset_config

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "head_dim": 24, "mamba_num_heads": 4}
SCAN_PARAMETERS = ("A_log", "D", "dt_bias")


@pytest.fixture(scope="module")
def model():
    """A small decoder with every kind of layer: matrices bfloat16, what the scan and the router use float32."""
    torch.manual_seed(0)
    decoder = NemotronHForCausalLM(preset_config("tiny", pattern="ME*-M", **WIDTHS, **MIXTURE)).eval()
    for name, tensor in decoder.state_dict().items():
        tensor.uniform_(-0.2, 0.2)
        if name.endswith("dt_bias"):
            tensor.uniform_(0.5, 2.0)  # time steps far above transformers' lower clamp
    decoder.to(torch.bfloat16)
    for name, parameter in decoder.named_parameters():
        if name.endswith(SCAN_PARAMETERS):
            parameter.data = parameter.data.float() * 1.0001
    for name, buffer in decoder.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    return decoder


def write_checkpoint(folder, weights, config, *, shards=1, suffix="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def assert_same_weights(loaded, decoder):
    expected, found = decoder.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("shards", "suffix"), [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin")])
def test_nvidias_format_loads_bit_for_bit(model, tmp_path, shards, suffix):
    """Three shards by stride put the experts of one layer into different files."""
    folder = write_checkpoint(tmp_path / "nvidia", nvidia_weights(model), nvidia_config(model), shards=shards, suffix=suffix)
    loaded = load_language_model(folder)
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert loaded.config.head_dim == 24 and loaded.config.dtype == torch.bfloat16
    assert list(loaded.config.time_step_limit) == [0.0, math.inf]


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_transformers_format_loads_bit_for_bit(model, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    loaded = load_language_model(tmp_path / "saved")
    assert_same_weights(loaded, model)
    assert list(loaded.config.time_step_limit) == [0.0, math.inf]


def test_logits_equal_those_of_transformers_own_loader(model, tmp_path):
    """From two shards of NVIDIA's format here, from transformers' own format there."""
    folder = write_checkpoint(tmp_path / "nvidia", nvidia_weights(model), nvidia_config(model), shards=2)
    loaded = load_language_model(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    transformers_own = NemotronHForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (loaded(ids).logits - transformers_own(ids).logits).abs().max()
    assert difference <= 1e-4


def test_dtype_casts_but_never_narrows_what_the_scan_uses(model, tmp_path):
    folder = write_checkpoint(tmp_path / "nvidia", nvidia_weights(model), nvidia_config(model))
    half = load_language_model(folder, dtype=torch.float16)
    wide = load_language_model(folder, dtype=torch.float64)
    for name, tensor in half.state_dict().items():
        kept = name.endswith((*SCAN_PARAMETERS, "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.float16), name
        assert not kept or torch.equal(tensor, model.state_dict()[name])
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float64}


def test_a_larger_model_does_not_draw_the_weights_again(model, tmp_path):
    """transformers' post_init draws whatever carries no mark; the decoder inside a vision-language model went through it."""
    loaded = load_language_model(write_checkpoint(tmp_path / "nvidia", nvidia_weights(model), nvidia_config(model)))
    loaded.init_weights()
    loaded.apply(loaded._init_weights)
    assert_same_weights(loaded, model)


def test_weights_do_not_point_into_the_file(model, tmp_path):
    """A parameter mapped from the file would end the process when the file is overwritten; here its bytes are changed in place."""
    folder = write_checkpoint(tmp_path / "nvidia", nvidia_weights(model), nvidia_config(model))
    loaded = load_language_model(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * (folder / "model.safetensors").stat().st_size)
    assert_same_weights(loaded, model)


def test_tied_embeddings_need_no_head_in_the_file(tmp_path):
    decoder = NemotronHForCausalLM(preset_config("tiny", pattern="M-", tie_word_embeddings=True, **WIDTHS))
    weights = nvidia_weights(decoder)
    del weights["lm_head.weight"]
    loaded = load_language_model(write_checkpoint(tmp_path / "tied", weights, nvidia_config(decoder)))
    assert loaded.lm_head.weight is loaded.model.embeddings.weight


def test_heads_for_several_tokens_ahead_are_left_out(model, tmp_path):
    weights = nvidia_weights(model) | {"mtp.layers.0.norm.weight": torch.zeros(3)}
    assert_same_weights(load_language_model(write_checkpoint(tmp_path / "mtp", weights, nvidia_config(model))), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("backbone.layers.0.mixer.A_log"), "1 missing: model.layers.0.mixer.A_log"),
        (
            lambda weights: weights.pop("backbone.layers.1.mixer.experts.2.up_proj.weight"),
            "1 missing: model.layers.1.mixer.experts.2.up_proj.weight",
        ),
        (lambda weights: weights.update({"backbone.layers.9.norm.weight": torch.ones(2)}), "1 unexpected: model.layers.9.norm.weight"),
        (
            lambda weights: weights.update({"backbone.layers.1.mixer.experts.4.up_proj.weight": torch.ones(40, 64)}),
            "1 unexpected: model.layers.1.mixer.experts.4.up_proj.weight",
        ),
        (
            lambda weights: weights.update({"backbone.norm_f.weight": torch.ones(63)}),
            "1 of another shape: model.norm_f.weight \\(file \\(63,\\), model \\(64,\\)",
        ),
        (
            lambda weights: weights.update({"backbone.layers.1.mixer.experts.3.up_proj.weight": torch.ones(41, 64)}),
            "experts.3.up_proj.weight \\(file \\(41, 64\\), its neighbours \\(40, 64\\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(model, tmp_path, change, message):
    weights = nvidia_weights(model)
    change(weights)
    folder = write_checkpoint(tmp_path / "broken", weights, nvidia_config(model))
    with pytest.raises(ValueError, match=message):
        load_language_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "type 'llama'; expected 'nemotron_h'"),
        ({"num_hidden_layers": 6}, "num_hidden_layers 6, but its pattern has 5"),
        ({"hybrid_override_pattern": "MX*-M"}, "no valid Nemotron-H config"),
        ({"hidden_size": "wide"}, "no valid Nemotron-H config"),
        ({"hybrid_override_pattern": None}, "neither 'hybrid_override_pattern' nor"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantised weights"),
        ({"hybrid_override_pattern": "MM*-M"}, "do not fit the model"),
        ({"attention_head_dim": 32}, "q_proj.weight \\(file"),
    ],
)
def test_a_wrong_config_is_refused(model, tmp_path, change, message):
    folder = write_checkpoint(tmp_path / "wrong", nvidia_weights(model), nvidia_config(model) | change)
    with pytest.raises(ValueError, match=message):
        load_language_model(folder)


def test_a_config_that_is_no_json_is_refused(model, tmp_path):
    folder = write_checkpoint(tmp_path / "broken", nvidia_weights(model), nvidia_config(model))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_config(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_truncated_file_is_named(model, tmp_path, suffix):
    folder = write_checkpoint(tmp_path / "cut", nvidia_weights(model), nvidia_config(model), shards=2, suffix=suffix)
    shard = sorted(folder.glob(f"*-00002-of-00002.{suffix}"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"00002-of-00002.{suffix}.*damaged"):
        load_language_model(folder)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(model, tmp_path, with_index):
    folder = write_checkpoint(tmp_path / "gap", nvidia_weights(model), nvidia_config(model), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards: model-00002" if with_index else "holds 2 of 3 shards"):
        load_language_model(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load_language_model(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_language_model(tmp_path / "nowhere")


def test_a_folder_without_weights_is_refused(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(nvidia_config(model)))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_language_model(tmp_path)
