"""The chunked scan against the recurrence it stands for: values, gradients, final states, borders, dtypes and errors."""

import pytest
import torch
import torch.nn.functional as F
from random_scans import compare, random_case, relative

import vlm.decoder.ssd as ssd
from vlm.decoder.ssd import chunk_scan, recurrent_scan, state_update

TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


@pytest.mark.parametrize("seed", range(40))
def test_chunked_scan_equals_the_recurrence(seed):
    """A chunk border, a segment border inside a chunk, a rest that does not divide, groups read in the wrong order, a border that stops
    the value but lets the gradient through, digits lost in differences of long sums: all show here. 200 seeds, and random weights of the
    loss as well: python benchmarks/scan.py --exactness 200."""
    errors = compare(*random_case(seed), weigh=lambda part: part)  # half the squared results: no sum is small by chance
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("strength", [0.1, 1.0, 16.0, 200.0])
def test_the_gradient_of_a_keeps_its_digits_under_strong_decay(strength):
    """Where a step leaves next to nothing of the state, the gradient of A is small beside the terms that touch no decay at all. As a sum of
    differences with those it came out with four digits or none."""
    generator = torch.Generator().manual_seed(1)
    x, B, C = (torch.randn(1, 300, 2, 8, generator=generator) for _ in range(3))
    dt = torch.rand(1, 300, 2, generator=generator) * 0.1 + 0.05
    A = -torch.tensor([1.0, 0.7]) * strength
    slow, fast = A.double().requires_grad_(), A.clone().requires_grad_()
    y, _ = recurrent_scan(x, dt, slow, B, C)
    y.backward(y.detach())  # of half the squared output: under random weights it could be small by chance
    chunk_scan(x, dt, fast, B, C, 64).backward(y.detach().float())
    assert relative(fast.grad, slow.grad) < 1e-5


def test_a_gradient_that_nearly_cancels_keeps_five_digits():
    """Under random weights dt_bias' gradient is a sum over 8,223 positions that nearly cancels: with float32 time steps this shape, the
    worst of 200, was off by 1.3e-5."""
    generator = torch.Generator().manual_seed(1187)
    errors = compare(*random_case(187), weigh=lambda part: torch.randn(part.shape, generator=generator))
    assert errors["gradient of dt_bias"] < 1e-5
    assert max(errors.values()) < 1e-5


def test_nothing_is_kept_that_activation_checkpointing_could_not_drop():
    """States kept on the Function itself would stay in memory through every checkpointed layer."""
    tensors, _, _ = random_case(3, length=64)
    x, dt, A, B, C = (tensors[name].requires_grad_() for name in ("x", "dt", "A", "B", "C"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        y = chunk_scan(x, dt, A, B, C, 16, dt_softplus=True)
    states = 5 * x.shape[0] * x.shape[2] * x.shape[3] * B.shape[3]  # before each of four chunks, and after the last
    assert states in saved
    scan = y.grad_fn
    assert not [name for name, value in vars(scan).items() if isinstance(value, (torch.Tensor, list, tuple))]


def test_without_gradients_no_states_are_kept(monkeypatch):
    """Parameters want gradients even while answering; the memory of a backward pass that never comes was most of the scan's."""
    asked = []
    forward = ssd.ChunkedScan.apply
    monkeypatch.setattr(ssd, "ChunkedScan", type("Spy", (), {"apply": lambda *args: asked.append(args[-1]) or forward(*args)}))
    tensors, _, _ = random_case(3, length=20)
    tensors = {name: tensors[name].requires_grad_(name == "A") for name in ("x", "dt", "A", "B", "C")}
    with torch.no_grad():
        chunk_scan(**tensors, chunk_size=16)
    chunk_scan(**tensors, chunk_size=16)
    assert asked == [False, True]


def test_float64_inputs_are_computed_in_float64():
    """Rounded to float32 on the way, the error would be 1e-7 and numeric gradient checks meaningless."""
    tensors, settings, chunk_size = random_case(3, length=200)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    found, state = chunk_scan(**doubles, **settings, chunk_size=chunk_size, return_final_states=True)
    expected, expected_state = recurrent_scan(**doubles, **settings)
    assert found.dtype == state.dtype == torch.float64
    assert relative(found, expected) < 1e-12 and relative(state, expected_state) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_their_dtype_and_are_summed_in_float32(dtype):
    """Sums in bfloat16 over 500 positions would be off by percents, not by the 2^-8 of the last rounding."""
    tensors, _, _ = random_case(4, length=500)
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, expected_state = recurrent_scan(**halves, dt_softplus=True)
    found, state = chunk_scan(**halves, chunk_size=64, dt_softplus=True, return_final_states=True)
    assert found.dtype == dtype and state.dtype == torch.float32
    assert relative(found, expected) < 5e-3
    assert relative(state, expected_state) < 1e-5


def test_the_result_does_not_depend_on_the_chunk_size():
    """chunk_size is a hint: a caller may give any."""
    tensors, settings, _ = random_case(7, length=150)
    results = [chunk_scan(**tensors, **settings, chunk_size=size) for size in (1, 2, 50, 149, 150, 151, 4096)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_large_time_steps_neither_overflow_nor_lose_what_is_near():
    """Differences of one cumulative sum lose digits when the sum is large: big steps early must not spoil small ones later."""
    generator = torch.Generator().manual_seed(5)
    length, heads = 256, 2
    dt = torch.full((1, length, heads), 0.01)
    dt[:, :20] = 30.0
    x, B, C = (torch.randn(1, length, heads, 4, generator=generator) for _ in range(3))
    A = torch.tensor([-16.0, -1.0])
    expected, _ = recurrent_scan(x, dt, A, B, C)
    found = chunk_scan(x, dt, A, B, C, 256)
    assert relative(found[:, 40:], expected[:, 40:]) < 1e-5
    assert torch.isfinite(found).all()


def test_a_packed_row_equals_its_segments_one_by_one():
    """The meaning of seq_idx, without the reference recurrence: no state, and no gradient, crosses a border."""
    tensors, _, _ = random_case(11, length=130)
    tensors = {name: tensors[name][:1] if name in ("x", "dt", "B", "C") else tensors[name] for name in ("x", "dt", "A", "B", "C")}
    lengths = (1, 1, 63, 1, 40, 24)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    packed = chunk_scan(**tensors, chunk_size=32, dt_softplus=True, seq_idx=seq_idx)
    start = 0
    for length in lengths:
        part = {name: t if name == "A" else t[:, start : start + length] for name, t in tensors.items()}
        torch.testing.assert_close(
            packed[:, start : start + length], chunk_scan(**part, chunk_size=32, dt_softplus=True), rtol=1e-4, atol=1e-5
        )
        start += length


def test_a_neighbour_in_the_pack_never_matters():
    """Changing one segment, even to huge values, changes not a bit of another, in values or in gradients."""
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(1, 96, 2, 4, generator=generator) for _ in range(3))
    dt, A = torch.rand(1, 96, 2, generator=generator), torch.tensor([-0.1, -1.0])
    seq_idx = torch.tensor([0] * 41 + [1] * 55)[None]

    def run(scale):
        changed = x.clone()
        changed[:, :41] *= scale
        changed.requires_grad_()
        y = chunk_scan(changed, dt, A, B, C, 16, seq_idx=seq_idx)
        y[:, 41:].sum().backward()
        return y[:, 41:].detach(), changed.grad

    first, first_gradient = run(1.0)
    second, second_gradient = run(1e10)
    assert torch.equal(first, second)
    assert torch.equal(first_gradient[:, 41:], second_gradient[:, 41:])
    assert not first_gradient[:, :41].any()


def test_negative_time_steps_are_clamped_by_the_lower_limit():
    """mamba-ssm clamps to dt_limit always; without softplus a negative time step would let the state grow."""
    tensors, _, _ = random_case(13, length=40)
    tensors = {name: tensors[name] for name in ("x", "dt", "A", "B", "C")}
    tensors["dt"] = torch.randn_like(tensors["dt"])
    clamped = tensors | {"dt": tensors["dt"].clamp(min=0.0)}
    torch.testing.assert_close(chunk_scan(**tensors, chunk_size=16), chunk_scan(**clamped, chunk_size=16))
    torch.testing.assert_close(recurrent_scan(**tensors)[0], recurrent_scan(**clamped)[0])


@pytest.mark.parametrize("with_d", [True, False])
def test_state_update_is_one_step_of_the_recurrence(with_d):
    """Decoding and training must be the same model."""
    generator = torch.Generator().manual_seed(2)
    batch, heads, width, groups, size = 3, 6, 4, 2, 5
    state = torch.randn(batch, heads, width, size, generator=generator)
    x, dt = torch.randn(batch, heads, width, generator=generator), torch.randn(batch, heads, generator=generator)
    A, bias = -torch.rand(heads, generator=generator), torch.randn(heads, generator=generator)
    B, C = (torch.randn(batch, groups, size, generator=generator) for _ in range(2))
    settings = {
        "D": torch.randn(heads, generator=generator) if with_d else None,
        "dt_bias": bias,
        "dt_softplus": True,
        "dt_limit": (0.1, 0.6),
    }
    kept = state.clone()
    y, after = state_update(state, x, dt, A, B, C, **settings)
    expected, expected_state = recurrent_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], initial_states=state, **settings)
    assert relative(y, expected[:, 0]) < 1e-5 and relative(after, expected_state) < 1e-5
    assert torch.equal(state, kept)
    assert state_update(state, x.bfloat16(), dt, A, B, C, **settings)[0].dtype == torch.bfloat16


def test_an_empty_text_gives_back_the_initial_state():
    """A length of 0 reaches the scan when a prefix is empty."""
    tensors, _, _ = random_case(1, length=3)
    x, dt, B, C = (tensors[name][:, :0] for name in ("x", "dt", "B", "C"))
    start = torch.randn(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    y, state = chunk_scan(x, dt, tensors["A"], B, C, 16, initial_states=start, return_final_states=True)
    assert y.shape == x.shape and torch.equal(state, start)


SHAPES = {"x": (2, 6, 4, 3), "dt": (2, 6, 4), "A": (4,), "B": (2, 6, 2, 5), "C": (2, 6, 2, 5)}
WRONG = [
    ({"x": (2, 6, 12)}, "x has shape"),
    ({"dt": (2, 6, 3)}, "dt has shape"),
    ({"A": (3,)}, "A has shape"),
    ({"B": (2, 5, 2, 5)}, "B and C have shapes"),
    ({"C": (2, 6, 2, 4)}, "B and C have shapes"),
    ({"B": (2, 6, 3, 5), "C": (2, 6, 3, 5)}, "do not divide into 3 groups"),
    ({"D": (3,)}, "D has shape"),
    ({"D": (1,)}, "D has shape"),
    ({"z": (2, 6, 4)}, "z has shape"),
    ({"dt_bias": (1,)}, "dt_bias has shape"),
    ({"seq_idx": (1, 6)}, "seq_idx has shape"),
    ({"initial_states": (2, 4, 5, 3)}, "initial_states has shape"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_shapes_are_named(changed, message):
    """Broadcasting would make a wrong shape a wrong result."""
    tensors = {name: torch.zeros(shape) for name, shape in (SHAPES | changed).items()}
    with pytest.raises(ValueError, match=message):
        chunk_scan(**tensors, chunk_size=4)


def test_a_chunk_of_no_length_is_refused():
    """It would loop for ever or divide by zero."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="chunk_size = 0"):
        chunk_scan(**tensors, chunk_size=0)


def test_the_recurrence_is_right_by_hand():
    """The reference itself: two positions, one head, worked out on paper."""
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    dt, A = torch.tensor([[[0.5], [0.25]]], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    y, state = recurrent_scan(one * 2, dt, A, one, one * 3, D=torch.tensor([10.0]), z=one)
    first = 0.5 * 2
    second = first * torch.exp(torch.tensor(-0.25, dtype=torch.float64)) + 0.25 * 2
    gate = F.silu(torch.tensor(1.0, dtype=torch.float64))
    expected = torch.stack([torch.tensor(3 * first + 20.0, dtype=torch.float64), 3 * second + 20.0]) * gate
    torch.testing.assert_close(y.flatten(), expected)
    torch.testing.assert_close(state.flatten(), second[None])
