"""Drawn tokens: the right shares, of the most probable alone where that is asked for, and nothing of a batch mate in a row's draw."""

import pytest
import torch

import vlm.engine.sampling as sampling
from vlm.engine.sampling import draw_tokens


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shares(logits, temperature, top_p, draws=4000):
    """How often each token is drawn, by one generator after the other."""
    (generator,) = seeded(0)
    found = draw_tokens(logits.expand(draws, -1), [temperature] * draws, [top_p] * draws, [generator] * draws)
    return torch.tensor(found).bincount(minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 6), (0.95, 4), (0.5, 1), (1e-9, 1)])
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p, kept):
    probabilities = torch.tensor([0.05, 0.6, 0.0, 0.2, 0.1, 0.04, 0.01])
    logits = (probabilities.log() * temperature)[None]  # the probability that is left after the division
    expected = probabilities.clone()
    expected[probabilities.argsort(descending=True)[kept:]] = 0.0
    assert (shares(logits, temperature, top_p) - expected / expected.sum()).abs().max() < 0.03
    assert ((shares(logits, temperature, top_p) > 0) <= (expected > 0)).all()


@pytest.mark.parametrize("most", [1024, 3])
def test_a_row_s_draw_is_its_own(most, monkeypatch):
    """Alone, among mates of other settings, and where some need the whole row sorted and some do not."""
    monkeypatch.setattr(sampling, "MOST_PROBABLE", most)
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 8, 40)[:, None]
    settings = [(0.5 + row % 3, (1.0, 0.9, 0.3)[row % 3]) for row in range(40)]
    together = draw_tokens(logits, *map(list, zip(*settings, strict=True)), seeded(*range(40)))
    alone = [draw_tokens(logits[row : row + 1], [t], [p], seeded(row))[0] for row, (t, p) in enumerate(settings)]
    assert together == alone


def test_sorting_a_part_first_changes_no_draw(monkeypatch):
    logits = torch.randn(60, 200, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 4, 60)[:, None]
    reached = logits.softmax(-1).topk(20).values.sum(-1) >= 0.7
    assert 10 < reached.sum() < 50  # some rows are settled by their twenty most probable tokens, some are not
    found = []
    for most in (1024, 20):
        monkeypatch.setattr(sampling, "MOST_PROBABLE", most)
        found.append(draw_tokens(logits, [1.0] * 60, [0.7] * 60, seeded(*range(60))))
    assert found[0] == found[1]


def test_what_cannot_be_said_is_never_drawn(monkeypatch):
    """At either end of what a generator gives: the first token and the last are impossible."""
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]])
    for uniform, expected in ((0.0, 1), (1.0 - 2.0**-53, 2), (1.0, 2)):
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: torch.tensor(uniform, dtype=torch.float64))
        assert draw_tokens(logits, [1.0], [1.0], seeded(0)) == [expected]
