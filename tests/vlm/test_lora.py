"""Adapters on the decoder: they reach what they say, learn in the first step, travel, and merge; what they miss is an error."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from vlm.assemble import assemble
from vlm.checkpoint import save_model
from vlm.lora import ALL_PROJECTIONS, AdapterWatch, add_lora, coverage, load_adapter, merge_adapter, save_adapter

peft = pytest.importorskip("peft")
IDS = torch.arange(40, 70)[None]


@pytest.fixture
def model(exact_model):
    return copy.deepcopy(exact_model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def taught(model, seed=0):
    """Adapters as after training: the second matrices are not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("target", ALL_PROJECTIONS)
def test_an_adapter_on_any_projection_moves_the_answer(model, target):
    """A fused path that reads the raw weight would leave the logits as they were: out_proj is where that happens."""
    before = logits(model)
    add_lora(model, target, rank=2)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)  # a fresh adapter adds nothing
    assert (logits(taught(model)) - before).abs().max() > 1e-4


@pytest.mark.parametrize("target", ALL_PROJECTIONS)
def test_every_adapter_learns_in_the_first_step(model, target):
    watch = AdapterWatch(add_lora(model, [target], rank=2))
    model(input_ids=IDS, labels=IDS).loss.backward()
    watch.check()


def test_an_adapter_that_a_fused_path_passes_by_is_named(model):
    """Planted: the mixer multiplies with the weight itself, as a fused kernel does."""
    add_lora(model, rank=2)
    mixer = model.language_model.model.layers[0].mixer
    layer = mixer.out_proj
    mixer.out_proj = nn.Identity()
    mixer.out_proj.forward = lambda y: nn.functional.linear(y, layer.base_layer.weight)
    mixer.passed_by = layer
    watch = AdapterWatch(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match=r"1 adapters had no gradient in the first step: .*layers\.0\.mixer\.passed_by \(default\)"):
        watch.check()


def test_a_watch_sees_gradients_that_are_taken_away_at_once(model):
    """ZeRO keeps no `.grad`; looking there would call every adapter silent."""
    watch = AdapterWatch(add_lora(model, rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    model(input_ids=IDS, labels=IDS).loss.backward()
    watch.check()


def test_a_watch_without_adapters_is_refused(model):
    with pytest.raises(ValueError, match="no adapters to watch"):
        AdapterWatch(model)


def test_only_adapters_train_in_the_decoder_and_the_rest_is_left_as_it_was(model):
    """peft freezes the projector too; alignment would silently stop."""
    model.vision_encoder.requires_grad_(False)
    add_lora(model, ["in_proj", "q_proj"], rank=2)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in training if name.startswith("language_model.")} == {name for name in training if ".lora_" in name} != set()
    assert {name for name in training if name.startswith("projector.")} == {
        f"projector.{name}" for name, _ in model.projector.named_parameters()
    }
    assert not any(name.startswith("vision_encoder.") for name in training)


def test_coverage_counts_layers_and_parameters_of_each_kind(model):
    """Attention projections alone: the right list for a Transformer reaches no Mamba layer, and the table says so."""
    rows = {row.layer_type: row for row in coverage(add_lora(model, ["q_proj", "v_proj"], rank=2))}
    config = model.config.text_config
    assert list(rows) == ["mamba", "attention", "mlp"]
    assert (rows["mamba"].layers, rows["mamba"].layers_reached, rows["mamba"].parameters_reached) == (2, 0, 0)
    attention = rows["attention"]
    queries, values = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    assert (attention.layers, attention.layers_reached) == (2, 2)
    assert attention.parameters_reached == 2 * (queries + values) * config.hidden_size
    assert attention.parameters == 2 * 2 * (queries + values) * config.hidden_size
    assert attention.adapter_parameters == 2 * 2 * (2 * config.hidden_size + queries + values)
    assert "2 of   2 layers    50.0% of" in attention.line() and "0 of   2 layers     0.0% of" in rows["mamba"].line()


def test_one_layer_can_be_chosen(model):
    rows = {row.layer_type: row for row in coverage(add_lora(model, ["layers.0.mixer.in_proj"], rank=2))}
    assert [rows[kind].layers_reached for kind in ("mamba", "attention", "mlp")] == [1, 0, 0]


def test_a_mixture_is_reached_only_in_part(model):
    """Its experts are one fused tensor: the table must not call the layer covered."""
    from vlm.decoder import preset_config

    small = preset_config(
        "tiny", pattern="ME", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
        moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1,
    )  # fmt: skip
    from transformers.models.nemotron_h import NemotronHForCausalLM

    from vlm.decoder import take_over_mixers

    model.language_model = NemotronHForCausalLM(small)
    take_over_mixers(model.language_model)
    rows = {row.layer_type: row for row in coverage(add_lora(model, rank=2))}
    assert list(rows) == ["mamba", "moe"] and rows["moe"].layers_reached == 1
    assert 0 < rows["moe"].parameters_reached < 0.5 * rows["moe"].parameters


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["in_proj", "qproj"], "'qproj' matches no linear layer of the decoder; nearest is 'q_proj'"),
        (["gate_proj"], "'gate_proj' matches no linear layer"),
        (["conv1d"], "'conv1d' matches no linear layer"),
        (["lm_head"], "'lm_head' matches no linear layer"),
        (["layers.9.mixer.in_proj"], "matches no linear layer of the decoder; nearest is 'language_model.model.layers"),
        ([], "no LoRA targets; expected some of"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(model, targets, message):
    """A list copied from another model would train less than it says."""
    with pytest.raises(ValueError, match=message):
        add_lora(model, targets)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(model, settings):
    with pytest.raises(ValueError, match="expected rank >= 1"):
        add_lora(model, **settings)


def test_a_second_set_of_adapters_is_refused(model):
    add_lora(model, ["in_proj"])
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(model, ["out_proj"])


def test_saved_adapters_give_the_same_answer_on_a_fresh_model(model, exact_model, tmp_path):
    expected = logits(taught(add_lora(model, rank=2, alpha=8.0)))
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # replaces
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    torch.testing.assert_close(logits(load_adapter(copy.deepcopy(exact_model), tmp_path / "adapter")), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by an old name
def test_peft_opens_what_was_saved(model, exact_model, tmp_path):
    """A user who knows peft needs none of our functions."""
    expected = logits(taught(add_lora(model, ["in_proj", "layers.1.mixer.q_proj"], rank=2)))
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(exact_model), str(save_adapter(model, tmp_path / "adapter")))
    torch.testing.assert_close(logits(opened), expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_of_another_model_is_refused(model, tmp_path):
    save_adapter(add_lora(model, rank=2), tmp_path / "adapter")
    other = assemble("tiny")[0]
    del other.language_model.model.layers[4:]
    with pytest.raises(ValueError, match="adapters for 6 layers that this model has not"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="expected adapter_config.json"):
        load_adapter(other, tmp_path)


def test_a_merged_model_is_a_plain_one_with_the_same_answer(model, exact_model):
    expected = logits(taught(add_lora(model, rank=2)))
    assert merge_adapter(model) is model
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert model.state_dict().keys() == exact_model.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in exact_model.modules()]


def test_there_must_be_adapters_to_save_or_merge(model, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, tmp_path / "x")
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapter(model)


@pytest.mark.parametrize("way", ["save_model", "save_pretrained"])
def test_a_model_with_adapters_inside_is_not_saved_as_a_model(model, tiny_processor, tmp_path, way):
    """Its names fit no model: the folder was written without a word, and from_pretrained drew the decoder's matrices anew."""
    add_lora(model, ["in_proj", "q_proj"], rank=2)
    folder = tmp_path / "model"
    save = {"save_model": lambda: save_model(model, tiny_processor, folder), "save_pretrained": lambda: model.save_pretrained(folder)}[way]
    with pytest.raises(ValueError, match=r"LoRA adapters in 4 layers .*merge_adapter\), or save them alone \(vlm.lora.save_adapter"):
        save()
    assert not list(tmp_path.iterdir())
    merge_adapter(model)
    save()
    assert (folder / "model.safetensors").is_file()


def test_adapters_that_transformers_put_in_are_saved_alone_by_it(model, tmp_path):
    """`add_adapter` and `save_pretrained` are a user's own way; ours must not stand in it."""
    model.add_adapter(peft.LoraConfig(r=2, target_modules=r"language_model\..*\.in_proj"))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()


def test_packed_samples_stay_apart_under_adapters(model):
    """The adapters run inside the same mixers; a wrapper that dropped the layout would leak."""
    taught(add_lora(model, rank=2))
    whole = model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 12, 30])).logits[0]
    apart = torch.cat([model(input_ids=IDS[:, :12]).logits[0], model(input_ids=IDS[:, 12:]).logits[0]])
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-5)


def test_without_peft_the_command_is_named():
    """And `import vlm` works all the same."""
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "import vlm, vlm.lora\n"
        "from vlm.assemble import assemble\n"
        "try: vlm.lora.add_lora(assemble('tiny')[0])\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert "pip install 'nemotron-h-vision[train]'" in result.stdout, result.stderr
