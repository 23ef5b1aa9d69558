"""Log-probabilities of the tokens said: those of the plain model read over prompt and answer, for each request its own."""

import pytest
import torch
from engine_requests import PICTURES, ask

from vlm.engine import Engine, Request


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
