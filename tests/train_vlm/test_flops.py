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


WAYS = {
    "all": Parts(**ALL),
    "align": Parts(projector=1e-3),
    "frozen encoder": Parts(projector=1e-3, language_model=1e-3),
    "decoder alone": Parts(projector=None, language_model=1e-3),
    "last block": Parts(vision_encoder=None, last_encoder_blocks=Part(1e-3, blocks=1), projector=1e-3, language_model=1e-3),
}


def without_scan(x, *rest, **more):
    return x * 1.0, None


def without_attention(self, query, key, value, layout):
    return query * 1.0 + (key.sum() + value.sum()) * 0.0


@pytest.fixture
def emptied(small, monkeypatch):
    """The small model and its processor; scan and attention do nothing that the counter sees."""
    monkeypatch.setattr("vlm.decoder.mixer.chunk_scan", without_scan)
    monkeypatch.setattr(HybridAttention, "_packed", without_attention)
    monkeypatch.setattr("vlm.loss._is_plain", lambda head, hidden: False)  # the counter does not know products in place
    return small


@pytest.mark.parametrize("parts", WAYS.values(), ids=WAYS)
def test_matrices_encoder_and_head_are_what_torch_counts(emptied, parts):
    """Scan and attention are taken out of the pass: the counter sees what an implementation does, not what is asked for. They have tests of
    their own below."""
    model, processor = emptied
    apply_parts(model, parts)
    costs = count_costs(model)
    for tokens, tiles, supervised in ((200, 3, 40), (90, 1, 25)):
        drawn = sample(processor, model, tokens, tiles, supervised)
        batch = pack([drawn], processor.renderer.end_of_turn_id, processor.image_processor.tile_size)
        ours = costs.step(batch["samples"]) - tokens * costs.scan_token - tokens * (tokens + 1) / 2 * costs.attention_pair
        assert ours == pytest.approx(counted(model, processor, batch), rel=0.02)


def plain_attention(self, query, key, value, layout):
    """One sequence, (1, H, T, E) each, as two products over all T x T pairs and a mask."""
    key, value = (each.repeat_interleave(self.num_key_value_groups, dim=1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * self.scaling).masked_fill(~torch.ones(2 * query.shape[2:3], dtype=bool).tril(), -torch.inf)
    return scores.softmax(-1) @ value


def recurrence_in_products(x, dt, A, B, C, *rest, **more):
    """A stand-in for `chunk_scan`: x (1, T, H, P), dt (1, T, H), A (H,), B and C (1, T, G, N). Per position and head the outer product of
    the input with B and the product of the state with C are matrix products, the decay is not: a product of one number with each."""
    B, C = (each[0].float().repeat_interleave(x.shape[2] // B.shape[2], dim=1) for each in (B, C))  # T H N
    state, outputs = x.new_zeros(*x.shape[2:], B.shape[2]), []
    for x_t, dt_t, B_t, C_t in zip(x[0], dt[0], B, C, strict=True):
        decay = (dt_t * A).exp()[:, None, None]
        state = decay * state + torch.bmm((x_t * dt_t[:, None])[:, :, None], B_t[:, None, :])  # H P N
        outputs.append(torch.bmm(state, C_t[:, :, None])[:, :, 0])
    return torch.stack(outputs)[None], None


def drawn_batch(model, processor, tokens: int) -> dict:
    return pack([sample(processor, model, tokens, 1, 25)], processor.renderer.end_of_turn_id, processor.image_processor.tile_size)


@pytest.mark.parametrize("parts", WAYS.values(), ids=WAYS)
def test_attention_is_what_torch_counts_over_all_pairs(emptied, parts, monkeypatch):
    """Forwards and back, to the last operation: T x T pairs in the products, of which T (T + 1) / 2 are below the diagonal and counted."""
    model, processor = emptied
    apply_parts(model, parts)
    costs = count_costs(model)
    batch = drawn_batch(model, processor, 90)
    nothing = counted(model, processor, batch)
    monkeypatch.setattr(HybridAttention, "_packed", plain_attention)
    assert counted(model, processor, batch) - nothing == 90**2 * costs.attention_pair > 0


@pytest.mark.parametrize("parts", WAYS.values(), ids=WAYS)
def test_the_products_of_the_recurrence_are_what_torch_counts(emptied, parts, monkeypatch):
    """Forwards and back, to the last operation; what the counter cannot see is the decay (P N) and dt and D (3 P) of each head."""
    model, processor = emptied
    apply_parts(model, parts)
    costs = count_costs(model)
    batch = drawn_batch(model, processor, 40)
    nothing = counted(model, processor, batch)
    monkeypatch.setattr("vlm.decoder.mixer.chunk_scan", recurrence_in_products)
    mixers = [block.mixer for block in model.language_model.model.layers if isinstance(block.mixer, Mamba2Mixer)]
    unseen = sum(3 * mixer.num_heads * mixer.head_dim * (mixer.ssm_state_size + 3) for mixer in mixers)
    assert counted(model, processor, batch) - nothing == 40 * (costs.scan_token - unseen) > 0


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


OTHERS = ("NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU")


@pytest.mark.parametrize("name", OTHERS)
def test_a_device_with_a_like_name_is_measured(name):
    """By pieces of names an L40 was an L4 and an RTX A1000 an A100: an MFU that is off by half or by tens, and says where it is from."""
    assert known_peak(name, "bfloat16") is None


KNOWN = {"NVIDIA A100-SXM4-80GB": 3.12e14, "NVIDIA A100 80GB PCIe": 3.12e14, "NVIDIA L40S": 3.62e14, "NVIDIA L4": 1.21e14,
         "NVIDIA GH200 480GB": 9.89e14, "NVIDIA GeForce RTX 4090": 1.65e14}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_devices_go_by_whole_words(name):
    assert known_peak(name, "bfloat16") == KNOWN[name]


def test_a_measured_peak_is_a_speed_this_machine_has():
    slow, fast = (measure_peak(torch.device("cpu"), torch.float32, size=size) for size in (8, 512))
    assert 0 < slow < fast < 1e14
