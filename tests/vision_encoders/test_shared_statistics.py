"""BatchNorm over the tiles of two ranks equals BatchNorm over all of them in one process; see statistics_on_ranks.py."""

from pathlib import Path

import pytest
from started_ranks import found_on_ranks
from torch import nn

from vision_encoders.shared_statistics import share_statistics, trained_batch_norms

SCRIPT = Path(__file__).with_name("statistics_on_ranks.py")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    return found_on_ranks(SCRIPT, 2, tmp_path_factory.mktemp("statistics") / "found.json")


@pytest.mark.parametrize(
    "layer", ["plain", "without affine", "without running statistics", "cumulative", "with an activation", "frozen affine"]
)
@pytest.mark.parametrize("layout", ["", ", channels last"])
def test_two_ranks_compute_what_one_process_does(on_ranks, layer, layout):
    """Output, gradients, running statistics of three passes in float64, two tiles on one rank and five on the other; by its own tiles
    alone a rank would be off by more than 0.1."""
    assert all(found[layer + layout] < 1e-12 for found in on_ranks)


def test_a_whole_encoder_and_other_shapes_and_dtypes(on_ranks):
    assert all(found["rows"] < 1e-12 and found["encoder"] < 1e-9 and found["float32"] < 1e-5 for found in on_ranks)
    for found in on_ranks:
        *dtypes, error = found["bfloat16"]
        assert dtypes == ["torch.bfloat16", "torch.bfloat16"] and error <= 2**-7  # half a step of numbers from 2 to 4: computed in float32
        assert found["eval"]


def test_a_blank_tile_counts_in_no_rank_s_statistics(on_ranks):
    """A rank without an image encodes a black tile: the others' numbers must be those without it, and its own layers move as theirs do."""
    first, second = (found["blank"] for found in on_ranks)
    assert first["output"] < 1e-12 and first["gradient"] < 1e-12 and second["finite"] and second["gradient"] == 0.0
    assert first["running"] < 1e-12 and second["running"] < 1e-12
    assert first["blank everywhere"] and second["blank everywhere"]


def test_layers_that_do_not_train_are_left_alone():
    encoder = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.LayerNorm(4), nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    assert [name for name, _ in trained_batch_norms(encoder)] == ["3"]


def test_one_process_has_nothing_to_share():
    """Torch's own kernel serves it; a wrapped layer would wait for nobody."""
    module = nn.BatchNorm2d(3)
    assert share_statistics(module) == 0 and "forward" not in vars(module)
