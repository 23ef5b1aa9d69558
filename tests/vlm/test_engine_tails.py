"""The engine's batches of rows without states of their own: the answers of requests one by one, within the memory that was given."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.assemble import assemble
from vlm.decoder import decode_step, serving_attention, tails
from vlm.decoder.serving import ServingDecoder
from vlm.engine import Engine, Request
from vlm.engine.memory import StateCost
from vlm.engine.wave import Wave

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for seed, (height, width) in enumerate([(64, 200), (64, 64), (130, 64)])
]


def ask(number: int, picture: Image.Image | None, **settings) -> Request:
    parts = [] if picture is None else [{"type": "image", "image": picture}]
    return Request([{"role": "user", "content": [*parts, {"type": "text", "text": f"question {number}"}]}], **settings)


def use_tails(monkeypatch):
    """These states are too small for tails to pay, and these questions for so many tokens."""
    monkeypatch.setattr(tails, "LEAST_STATE_BYTES", 1)
    monkeypatch.setattr(tails, "CAPACITY", 32)
    monkeypatch.setattr(decode_step, "LEAST_SHARED_ELEMENTS", 1)


@pytest.fixture
def with_tails(monkeypatch):
    use_tails(monkeypatch)


@pytest.mark.parametrize("memory_bytes", [2**25, 2**22])
def test_mixes_are_answered_as_one_by_one(exact_model, tiny_processor, monkeypatch, memory_bytes):
    """Several pictures with many questions each, arriving late, cancelled, of different lengths, some scored, some going on in a
    conversation; with memory for all, and for a few."""
    draw = random.Random(5)
    requests = [
        ask(
            number,
            draw.choice([None, *PICTURES, *PICTURES]),
            max_new_tokens=draw.choice((1, 3, 6, 12)),
            **({"score_texts": ("red", "a dozen green apples")} if number % 5 == 0 else {}),
        )
        for number in range(30)
    ]
    alone = [Engine(exact_model, tiny_processor, self_check=False, max_batch=1).generate([request])[0] for request in requests]
    use_tails(monkeypatch)
    engine = Engine(exact_model, tiny_processor, max_batch=16, memory_bytes=memory_bytes, self_check=False)
    tickets, most_tails = [], 0
    while len(tickets) < len(requests) or not engine._scheduler.is_idle:
        tickets += [
            engine.submit(request, keep=draw.random() < 0.2) for request in requests[len(tickets) : len(tickets) + draw.randint(0, 9)]
        ]
        if tickets and draw.random() < 0.1:
            draw.choice(tickets).cancel()
        engine.step()
        slots = engine._scheduler.slots
        if slots is not None:
            running = len(engine._scheduler.running)
            most_tails = max(most_tails, sum(slots.is_tail[:running]))
            assert slots.size_bytes() + engine._scheduler._held_bytes(Wave()) + engine.kept.bytes <= memory_bytes
            assert not any(slots.common[running:]) and not any(slots.is_tail[running:])
    assert most_tails >= (5 if memory_bytes == 2**25 else 2)  # the rows that had one at the same time
    for ticket, expected in zip(tickets, alone, strict=True):
        if ticket.answer.stop_reason != "cancelled":
            assert ticket.answer.text == expected.text
            assert ticket.answer.scores == (expected.scores and pytest.approx(expected.scores, abs=1e-4))
    assert sum(ticket.answer.stop_reason == "cancelled" for ticket in tickets) < 10


def test_a_turn_goes_on_from_a_row_with_a_tail(exact_model, tiny_processor, with_tails):
    """What is kept of it is a state like any other, and holds no other row's memory."""
    engine = Engine(exact_model, tiny_processor, self_check=False)
    tickets = [engine.submit(ask(number, PICTURES[0], max_new_tokens=4)) for number in range(5)]
    first = [ticket.result() for ticket in tickets]
    assert all(common is None for _, state in engine.kept._states.values() for common in state.common)
    messages = [
        *ask(2, PICTURES[0]).messages,
        {"role": "assistant", "content": first[2].text},
        {"role": "user", "content": "and now?"},
    ]
    request = Request(messages, max_new_tokens=6)
    found = engine.generate([request])[0]
    fresh = Engine(exact_model, tiny_processor, self_check=False).generate([request])[0]
    assert found.text == fresh.text and found.shared_tokens > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cost_with_tails_is_that_of_the_buffers(with_tails, dtype):
    model, _ = assemble("tiny", seed=0)
    model.to(dtype)
    slots = ServingDecoder(model.language_model).slots(3, 128, with_tails=True)
    assert slots.tails is not None
    assert StateCost.of(model.config.text_config, dtype, with_tails=True).bytes(3, 128) == slots.size_bytes()


def test_the_common_state_of_running_rows_counts_as_used(exact_model, tiny_processor, with_tails):
    """Once, whoever holds it, and as long as somebody does."""
    engine = Engine(exact_model, tiny_processor, self_check=False)
    for number in range(4):
        engine.submit(ask(number, PICTURES[0], max_new_tokens=3 + number), keep=False)
    engine.step()
    scheduler = engine._scheduler
    source = scheduler.slots.common[0].source
    assert len(scheduler.running) == 4 and all(common.source is source for common in scheduler.slots.common[:4])
    used = scheduler._need(4, 64, Wave())
    assert used == scheduler.cost.bytes(4, 64) + source.size_bytes()
    while engine.step():
        pass
    assert scheduler._need(4, 64, Wave()) == scheduler.cost.bytes(4, 64) and not any(scheduler.slots.common)


def test_the_self_check_looks_at_tails_and_shared_keys(exact_model, tiny_processor, with_tails, monkeypatch):
    """A fault of either is found at start."""
    Engine(exact_model, tiny_processor)
    attend = serving_attention.attend_shared
    monkeypatch.setattr(serving_attention, "attend_shared", lambda *a: attend(*a) * 1.5)
    with pytest.raises(RuntimeError, match="the self-check failed"):
        Engine(exact_model, tiny_processor)
    monkeypatch.setattr(serving_attention, "attend_shared", attend)
    scan = tails.TailStep.scan
    monkeypatch.setattr(tails.TailStep, "scan", lambda *a: scan(*a) * 1.5)
    with pytest.raises(RuntimeError, match="the self-check failed"):
        Engine(exact_model, tiny_processor)


def test_what_was_not_finite_in_a_tail_is_gone_with_its_row(exact_model, tiny_processor, with_tails, monkeypatch):
    """A weight of 0 does not hide it: the masked places of a tail are multiplied too."""
    engine = Engine(exact_model, tiny_processor, self_check=False)
    requests = [ask(number, PICTURES[0], max_new_tokens=6) for number in range(4)]
    expected = [answer.text for answer in engine.generate(requests)]
    decode, calls = engine._scheduler.decoder.decode, []

    def poisoned(tokens, slots, span, **how):
        calls.append(1)
        if len(calls) == 3:
            for tail in slots.tails.layers.values():
                for part in (tail.fed, tail.keys, tail.decay):
                    part[1] = float("nan")
        return decode(tokens, slots, span, **how)

    monkeypatch.setattr(engine._scheduler.decoder, "decode", poisoned)
    answers = engine.generate(requests)
    assert "not finite" in answers[1].error and [answers[place].text for place in (0, 2, 3)] == [expected[place] for place in (0, 2, 3)]
    # Who comes into that row has less in its tail than its neighbours: what lies behind it is masked, and must be numbers.
    later = [ask(number, PICTURES[0], max_new_tokens=6) for number in (10**12, 1, 10**13, 10**14)]
    expected = [Engine(exact_model, tiny_processor, self_check=False).generate([request])[0] for request in later]
    assert [answer.text for answer in engine.generate(later)] == [answer.text for answer in expected]
