"""Counted operations against torch's FLOP counter, over forward and backward passes of a small model with its parts frozen in each way."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train_vlm.batching import pack
from train_vlm.flops import count_costs, known_peak, measure_peak, scan_flops
from train_vlm.freezing import apply_parts
from train_vlm.recipe import Part, Parts
from train_vlm.training_step import forward_inputs
from vlm.assemble import assemble
from vlm.decoder.attention import HybridAttention
from vlm.decoder.mixer import Mamba2Mixer

ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
ALL = {"vision_encoder": 1e-3, "projector": 1e-3, "language_model": 1e-3}


@pytest.fixture(scope="module")
def small():
    model, processor = assemble("tiny", vision_settings=ENCODER, seed=0)
    return model, processor


def sample(processor, model, tokens: int, tiles: int, supervised: int) -> dict:
    """A sample of exactly these counts."""
    visual = [model.config.image_token_id] * tiles * model.config.visual_tokens_per_tile
    ids = visual + [5] * (tokens - len(visual))
    labels = [-100] * (tokens - supervised) + [5] * supervised
    pixels = torch.zeros(tiles, ENCODER["image_size"], ENCODER["image_size"], 3, dtype=torch.uint8)
    return {"source": 0, "id": "x", "input_ids": ids, "labels": labels, "pixels": pixels, "tiles_reduced": 0}


def counted(model, processor, batch) -> float:
    """torch's counter over one pass forwards and back."""
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        output = model(**forward_inputs(batch, processor, torch.device("cpu"), torch.float32), num_items_in_batch=1)
        output.loss.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "parts",
    [
        Parts(**ALL),
        Parts(projector=1e-3),
        Parts(projector=1e-3, language_model=1e-3),
        Parts(projector=None, language_model=1e-3),
        Parts(vision_encoder=None, last_encoder_blocks=Part(1e-3, blocks=1), projector=1e-3, language_model=1e-3),
    ],
    ids=["all", "align", "frozen encoder", "decoder alone", "last block"],
)
def test_matrices_encoder_and_head_are_what_torch_counts(small, parts, monkeypatch):
    """Scan and attention are taken out of the pass: the counter sees what an implementation does, not what is asked for. They have tests of
    their own below."""
    model, processor = small
    apply_parts(model, parts)
    costs = count_costs(model)
    monkeypatch.setattr("vlm.decoder.mixer.chunk_scan", lambda x, *rest, **more: (x * 1.0, None))
    monkeypatch.setattr(HybridAttention, "_packed", lambda self, query, key, value, layout: query * 1.0 + (key.sum() + value.sum()) * 0.0)
    monkeypatch.setattr("vlm.loss._is_plain", lambda head, hidden: False)  # the counter does not know products in place
    for tokens, tiles, supervised in ((200, 3, 40), (90, 1, 25)):
        drawn = sample(processor, model, tokens, tiles, supervised)
        batch = pack([drawn], processor.renderer.end_of_turn_id, processor.image_processor.tile_size)
        ours = costs.step(batch["samples"]) - tokens * costs.scan_token - tokens * (tokens + 1) / 2 * costs.attention_pair
        assert ours == pytest.approx(counted(model, processor, batch), rel=0.02)


def test_a_scan_is_counted_as_the_recurrence_computes_it():
    """Operations of `recurrent_scan`, an element at a time, counted by hand over its lines for one position and head."""
    heads, width, state = 3, 4, 5
    decay, outer, read = width * state, 2 * width * state, 2 * width * state
    assert scan_flops(heads, width, state) == heads * (decay + outer + read + width + 2 * width)


def test_attention_counts_pairs_below_the_diagonal(small):
    """Twice as long a sample costs four times the pairs; two samples cost the sum, packed or not."""
    model, _ = small
    apply_parts(model, Parts(**ALL))
    costs = count_costs(model)
    heads = model.config.text_config.num_attention_heads
    mixers = [block.mixer for block in model.language_model.model.layers]
    layers = sum(isinstance(mixer, HybridAttention) for mixer in mixers)
    assert costs.attention_pair == layers * 4 * heads * model.config.text_config.head_dim * 3
    empty = {"tiles": 0, "supervised_tokens": 0}
    one, two = costs.step([{"tokens": 100, **empty}]), costs.step([{"tokens": 100, **empty}] * 2)
    assert two == 2 * one
    longer = costs.step([{"tokens": 200, **empty}])
    linear = 100 * (costs.matrices_token + costs.scan_token)
    assert (longer - 2 * linear) / (one - linear) == pytest.approx(4, rel=0.01)
    scans = [mixer for mixer in mixers if isinstance(mixer, Mamba2Mixer)]
    assert costs.scan_token == sum(3 * scan_flops(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size) for mixer in scans)


def test_the_longest_known_name_of_a_device_counts():
    """An H100 PCIe is three quarters of an H100; a device nobody listed is measured instead."""
    assert known_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 9.89e14
    assert known_peak("NVIDIA H100 PCIe", "bfloat16") == 7.56e14
    assert known_peak("NVIDIA H100 PCIe", "float32") == 5.1e13
    assert known_peak("A processor of 1998", "bfloat16") is None


def test_a_measured_peak_is_a_speed_this_machine_has():
    slow, fast = (measure_peak(torch.device("cpu"), torch.float32, size=size) for size in (8, 512))
    assert 0 < slow < fast < 1e14
