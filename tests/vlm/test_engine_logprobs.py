"""Log-probabilities of the tokens said: those of the plain model read over prompt and answer, for each request its own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_requests import PICTURES, ask

import vlm.engine.sampling as sampling
import vlm.engine.scheduler as scheduler
from vlm.engine import Engine, Request
from vlm.engine.sampling import told_logprobs


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(*tiny, max_tokens=2000, self_check=False)


def plain(model, processor, request: Request, tokens) -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities in float64, by one forward pass; a placeholder cannot be said."""
    prompt = processor.prepare(request.messages, add_generation_prompt=True)
    ids = torch.tensor([[*prompt.rendered.input_ids, *tokens]])
    pixels = processor.image_processor.normalize_pixels(prompt.pixels) if len(prompt.pixels) else None
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, len(prompt.rendered.input_ids) - 1 : -1]
    logits[:, model.config.image_token_id] = -float("inf")
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 4}], ids=["greedy", "drawn"])
def test_they_are_the_models_own(engine, tiny, settings):
    """At temperature 1, whatever a token was drawn with."""
    requests = [ask("what?", PICTURES[0], logprobs=3, **settings), ask("and here?", logprobs=0, **settings),
                ask("a third", PICTURES[1], logprobs=20, max_new_tokens=3, **settings), ask("a fourth", **settings)]  # fmt: skip
    together = engine.generate(requests)
    assert together[3].logprobs is None
    for request, answer in zip(requests[:3], together, strict=False):
        assert [one.token for one in answer.logprobs] == list(answer.tokens) and answer.tokens
        expected = plain(*tiny, request, answer.tokens)
        for row, one in zip(expected, answer.logprobs, strict=True):
            assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
            best = row.topk(request.logprobs)
            assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [float(row[token]) for token, _ in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_asking_for_them_changes_no_answer(engine):
    settings = {"temperature": 0.9, "seed": 7}
    found = [engine.generate([ask("what?", PICTURES[0], logprobs=told, **settings)])[0].tokens for told in (None, 0, 5)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("how", ["stop", "end", "cancel"])
def test_one_for_each_token_however_the_answer_ends(engine, how):
    """The last token of an answer that a stop text ends is one of them; the end of a turn is none."""
    request = ask("what?", PICTURES[0], logprobs=1, max_new_tokens=12, **({"stop": ("e",)} if how == "stop" else {}))
    (whole,) = engine.generate([ask("what?", PICTURES[0], max_new_tokens=12)])
    if how == "stop":
        letters = next(letter for letter in whole.text[2:] if letter.strip() and letter not in whole.text[:2])
        request = replace(request, stop=(letters,))
    real, ticket = engine._scheduler.choose, engine.submit(request)
    if how == "end":
        says = iter([50, 51, 52, engine.processor.renderer.end_of_turn_id])
        engine._scheduler.choose = lambda logits, tickets: [next(says) for _ in tickets]
    try:
        if how == "cancel":
            for _ in range(4):
                engine.step()
            ticket.cancel()
        answer = ticket.result()
    finally:
        engine._scheduler.choose = real
    assert answer.stop_reason == {"cancel": "cancelled"}.get(how, how) and 0 < len(answer.tokens) < 12
    assert tuple(one.token for one in answer.logprobs) == answer.tokens


def test_of_equals_the_one_that_was_said_comes_first():
    """Half precision has many; topk takes others than the choice does."""
    logits = torch.zeros(3, 40, dtype=torch.bfloat16)
    logits[:, 7:30] = 2.0
    asked = [SimpleNamespace(request=SimpleNamespace(logprobs=count)) for count in (0, 1, 4)]
    tokens = [20, 20, 29]
    for one, token, count in zip(told_logprobs(logits, tokens, asked), tokens, (0, 1, 4), strict=True):
        assert one.token == token and len(one.top) == count and len({best for best, _ in one.top}) == count
        assert not count or one.top[0] == (token, one.logprob)


def test_slices_of_rows_change_nothing(monkeypatch):
    logits = torch.randn(11, 50, generator=torch.Generator().manual_seed(0))
    asked = [SimpleNamespace(request=SimpleNamespace(logprobs=None if row == 4 else row % 4)) for row in range(11)]
    tokens = [None if row == 6 else row for row in range(11)]
    together = told_logprobs(logits, tokens, asked)
    monkeypatch.setattr(sampling, "ROWS_TOLD_TOGETHER", 2)
    assert told_logprobs(logits, tokens, asked) == together and [row for row in range(11) if together[row] is None] == [4, 6]


@pytest.mark.parametrize("said", [0, 2, 7])
def test_no_memory_for_them_costs_nobody_else_an_answer(engine, monkeypatch, said):
    """And a drawn answer stays that of its seed. Behind the prompt, amid an answer, at its last token."""
    settings = {"temperature": 1.0, "seed": 3}
    expected = engine.generate([ask("what?", PICTURES[0], **settings)])[0].tokens

    def fail(logits, tokens, tickets):
        if any(ticket.request.logprobs is not None and len(ticket.said) == said for ticket in tickets):
            raise RuntimeError("out of memory")
        return real(logits, tokens, tickets)

    real = scheduler.told_logprobs
    monkeypatch.setattr(scheduler, "told_logprobs", fail)
    found = engine.generate(
        [ask("what?", PICTURES[0], **settings), ask("and?", logprobs=1, max_new_tokens=8), ask("what?", PICTURES[0], **settings)]
    )
    assert found[1].error == "RuntimeError: out of memory" and found[1].stop_reason == "error"
    assert found[0].tokens == expected == found[2].tokens


def test_they_are_there_when_their_piece_of_text_is(engine):
    """Who reads along never sees a piece before what is told of it."""
    ticket = engine.submit(ask("what?", PICTURES[0], logprobs=1))
    tokenizer = engine.processor.tokenizer
    text = ""
    for piece in ticket:
        text += piece
        assert len(tokenizer.decode([one.token for one in ticket.logprobs])) >= len(text)
    assert tuple(ticket.logprobs) == ticket.answer.logprobs


@pytest.mark.parametrize("value", [-1, 21, True, 1.0, "2"])
def test_a_number_that_cannot_be_told_is_refused(value):
    with pytest.raises(ValueError, match=f"logprobs is {value!r}; expected"):
        Request([{"role": "user", "content": "x"}], logprobs=value)
