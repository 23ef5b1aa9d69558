"""Muon's update against the singular value decomposition it approximates, and the split of parameters between Muon and AdamW."""

import copy

import pytest
import torch

from train_vlm import muon
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups
from train_vlm.muon import MuonAdamW, is_muon_matrix, orthogonalize, share_out
from train_vlm.recipe import Data, Optimizer, Parts, Recipe, RecipeError, Run, Source


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    """A transposed or unnormalised iteration turns the update in another direction."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalize(matrix) @ v.T  # diagonal when the singular vectors are kept
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 1e-3
    assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.3


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 200), (128, 584)])
@pytest.mark.parametrize("kind", ["of full rank", "of rank 5", "graded over eight decades"])
def test_iterating_within_the_gram_matrix_is_iterating_on_the_matrix(shape, kind):
    """The fast path beside the definition, in float64 to rounding, in float32 within a ten thousandth of the largest entries; a gradient
    of few samples has a low rank, where the Gram matrix's own rounding is all that iterations find."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "of rank 5":
        left = torch.randn(shape[0], 5, generator=generator, dtype=torch.float64)
        matrix = left @ torch.randn(5, shape[1], generator=generator, dtype=torch.float64)
    elif kind.startswith("graded"):
        matrix = torch.logspace(0, -8, shape[0], dtype=torch.float64)[:, None] * matrix
    matrix = matrix / matrix.norm()
    expected = muon._iterate(matrix, 5)
    torch.testing.assert_close(muon._iterate_within_gram(matrix, 5), expected, rtol=0.0, atol=1e-12)
    found = muon._iterate_within_gram(matrix.float(), 5)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-5
    torch.testing.assert_close(muon._iterate_within_gram(matrix, 1), muon._iterate(matrix, 1), rtol=0.0, atol=1e-14)


def test_the_cheaper_way_is_taken(monkeypatch):
    """Within the Gram matrix from one and a half times as wide as high, on either side; a square is iterated itself."""
    taken = []
    for name in ("_iterate", "_iterate_within_gram"):
        monkeypatch.setattr(muon, name, lambda x, iterations, name=name: taken.append(name) or x)
    for shape in ((64, 64), (64, 160), (160, 64)):
        assert orthogonalize(torch.ones(shape)).shape == shape
    assert taken == ["_iterate", "_iterate_within_gram", "_iterate_within_gram"]


def test_every_rank_gets_all_updates_in_order(monkeypatch):
    """Ranks own different sizes; a message of one is as long as the longest."""
    parameters = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(5), torch.zeros(1, 2)]
    updates = [torch.full((p.numel(),), float(number)) for number, p in enumerate(parameters)]
    owners, said = [1, 0, 2, 1], {}
    monkeypatch.setattr(muon, "gather_over_ranks", lambda own: torch.stack([said.setdefault(rank, own)] * 4))
    for rank in range(4):  # first what each says
        muon._told([u for u, owner in zip(updates, owners, strict=True) if owner == rank], owners, parameters, rank, 4)
    monkeypatch.setattr(muon, "gather_over_ranks", lambda own: torch.stack([said[each] for each in range(4)]))
    for rank in range(4):
        heard = muon._told([u for u, owner in zip(updates, owners, strict=True) if owner == rank], owners, parameters, rank, 4)
        assert [each.tolist() for each in heard] == [each.tolist() for each in updates]
    assert muon._told(updates, [0] * 4, parameters, 0, 1) is updates


def test_first_step_is_the_scaled_orthogonalised_gradient_and_adamw_moves_the_rest():
    """Root mean square of a Muon step is 0.2 of the rate, whatever the gradient's size; rates set later reach both halves."""
    matrix, vector = torch.nn.Parameter(torch.zeros(32, 64)), torch.nn.Parameter(torch.zeros(8))
    groups = [
        {"params": [matrix], "lr": 1.0, "weight_decay": 0.0, "kind": "muon"},
        {"params": [vector], "lr": 1.0, "weight_decay": 0.0, "kind": "adamw"},
    ]
    optimizer = MuonAdamW(groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    matrix.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    vector.grad = torch.full((8,), -5.0)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), -0.01 * 0.2 * 8.0 * orthogonalize(matrix.grad), rtol=1e-3, atol=1e-6)
    assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)
    torch.testing.assert_close(vector.detach(), torch.full((8,), 0.01))


def test_matrices_and_convolutions_go_to_muon_words_and_filters_do_not(tiny_model):
    """Embedding rows orthogonalised as one matrix would move words that were not in the batch."""
    model = copy.deepcopy(tiny_model)
    parts = Parts(vision_encoder=1e-3, projector=1e-3, language_model=1e-3)
    apply_parts(model, parts)
    groups = parameter_groups(model, parts, Optimizer(kind="muon", muon_rate=2.0))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in groups if group["kind"] == "muon" for p in group["params"]}
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(names)  # each once
    assert any(name.endswith("in_proj.weight") for name in by_muon) and any(name.startswith("vision_encoder") for name in by_muon)
    assert not any(word in name for name in by_muon for word in ("embeddings.weight", "lm_head", "conv1d", "A_log", "norm"))
    assert all(group["peak_lr"] == (2e-3 if group["kind"] == "muon" else 1e-3) for group in groups)
    assert isinstance(make_optimizer(groups, Optimizer(kind="muon")), MuonAdamW)


def test_small_matrices_are_left_to_adamw():
    assert is_muon_matrix("up_proj.weight", torch.nn.Parameter(torch.zeros(16, 16)))
    assert is_muon_matrix("conv.weight", torch.nn.Parameter(torch.zeros(16, 3, 3, 3)))
    assert not is_muon_matrix("gate.weight", torch.nn.Parameter(torch.zeros(4, 64)))
    assert not is_muon_matrix("norm.weight", torch.nn.Parameter(torch.zeros(64)))


def test_muon_with_sharded_or_bfloat16_matrices_is_refused():
    """ZeRO hands the optimizer flat pieces; orthogonalising those is a silent wrong step."""
    data, parts, muon = Data((Source("shards"),)), Parts(), Optimizer(kind="muon")
    Recipe("sft", "m", "o", data, parts, Run(steps=1, zero_stage=0), muon)
    with pytest.raises(RecipeError, match="zero_stage to 0"):
        Recipe("sft", "m", "o", data, parts, Run(steps=1, zero_stage=2), muon)


def test_work_is_shared_out_so_that_ranks_finish_together():
    costs = [1, 9, 2, 8, 3, 7, 100]
    owners = share_out(costs, 2)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(2)]
    assert sorted(loads) == [30, 100]  # the dearest one alone
    assert share_out([5, 5, 5, 5], 2).count(0) == 2 and share_out([3, 1], 1) == [0, 0]
