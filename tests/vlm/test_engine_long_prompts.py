"""A prompt too long for one step is read over several, while the others go on: same answers, nothing read twice."""

import random
import time

import pytest
from engine_requests import PICTURES, ask

from vlm.engine import Engine, Request
from vlm.engine.scheduler import TOKENS_A_STEP
from vlm.engine.ticket import Begun, Ticket
from vlm.engine.wave import Wave

LONG = "a long story about a red ball and a blue box. " * 12


@pytest.fixture
def engine(exact_model, tiny_processor):
    return Engine(exact_model, tiny_processor, self_check=False)


@pytest.fixture(scope="module")
def alone(exact_model, tiny_processor):
    """The answer of an engine that reads everything at once."""
    return lambda request: Engine(exact_model, tiny_processor, self_check=False).generate([request])[0]


@pytest.fixture
def read(engine, monkeypatch):
    """Tokens of every call of the decoder that reads."""
    calls, prefill = [], engine._scheduler.decoder.prefill

    def counted(embeddings, slots, rows, lengths, **settings):
        calls.append(sum(lengths))
        return prefill(embeddings, slots, rows, lengths, **settings)

    monkeypatch.setattr(engine._scheduler.decoder, "prefill", counted)
    return calls


@pytest.mark.parametrize("limit", [7, 40, 100])
def test_a_prompt_read_in_parts_is_answered_as_one_read_at_once(engine, alone, read, monkeypatch, limit):
    """Parts that begin and end among words, tiles and tags; the last one leaves at least a token for the answer to begin with."""
    request = ask(LONG, *PICTURES, PICTURES[0], score_texts=("red", "a blue box"))
    expected = alone(request)
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", limit)
    found = engine.generate([request])[0]
    assert found.tokens == expected.tokens and found.prompt_tokens == expected.prompt_tokens > 200
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.shared_tokens == 0 and len(read) > expected.prompt_tokens // max(limit, 17) and max(read[:-1]) <= max(limit, 17)


def test_others_say_a_token_after_each_part(engine, alone, monkeypatch):
    first, long, last = ask("short", max_new_tokens=100), ask(LONG, PICTURES[0]), ask("later")
    expected = [alone(request).text for request in (first, long, last)]
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 40)
    end, take = engine.processor.renderer.end_of_turn_id, Ticket.take
    tickets = [engine.submit(first)]
    # It never ends by itself.
    monkeypatch.setattr(tickets[0], "take", lambda token, told: take(tickets[0], 50 if token == end else token, told))
    engine.step()
    submitted = time.monotonic()
    tickets += [engine.submit(long), engine.submit(last)]
    said = len(tickets[0].said)
    for steps in range(1, 5):
        engine.step()
        assert len(tickets[0].said) == said + steps and not tickets[1].said and tickets[1].begun.length > 40 * (steps - 1)
        if steps == 1:
            began = time.monotonic()
            time.sleep(0.05)
    assert [ticket.result().text for ticket in tickets[1:]] == expected[1:]
    # The wait ends when reading begins, and reading is part of the answer's time.
    assert tickets[1].answer.waited_seconds <= began - submitted and tickets[1].answer.first_token_seconds > 0.05
    tickets[0].cancel()
    assert engine._scheduler.is_idle and tickets[1].begun is None


QUESTIONS = [f"{LONG}{word}" for word in ("what colour?", "how many?", "where?", "who?")]


def test_questions_about_one_long_text_go_on_together_from_what_was_begun_for_the_first(engine, alone, read, monkeypatch):
    requests = [ask(words, PICTURES[0]) for words in QUESTIONS]
    expected = [alone(request).tokens for request in requests]
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 120)
    waves, whole = [], engine._scheduler.prefill.read
    monkeypatch.setattr(engine._scheduler.prefill, "read", lambda tickets, *rest: waves.append(len(tickets)) or whole(tickets, *rest))
    answers = engine.generate(requests)
    assert [answer.tokens for answer in answers] == expected and waves == [4]
    assert sum(read) < answers[0].prompt_tokens + 4 * 20  # the text once, then the end of four questions
    assert sorted(answer.shared_tokens > answer.prompt_tokens - 20 for answer in answers) == [False, True, True, True]


def test_questions_that_have_to_wait_go_on_from_it_too(engine, alone, read, monkeypatch):
    """One row: each waits for the one before."""
    requests = [ask(words, PICTURES[0]) for words in QUESTIONS]
    expected = [alone(request).tokens for request in requests]
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 120)
    engine._scheduler.most_rows = 1
    tickets = [engine.submit(request, keep=False) for request in requests]
    while engine.step():
        pass
    assert [ticket.answer.tokens for ticket in tickets] == expected
    assert sum(read) < tickets[0].answer.prompt_tokens + 4 * 80  # half a step is left of what was begun


def test_nothing_is_begun_while_no_row_is_free(engine, monkeypatch):
    """Those who run would stand still for one who cannot join them."""
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 40)
    engine._scheduler.most_rows = 1
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, rows: [50] * len(rows))
    running = engine.submit(ask("short", max_new_tokens=4))
    engine.step()
    long = engine.submit(ask(LONG))
    while running.answer is None:
        assert long.begun is None
        engine.step()
    engine.step()
    assert long.begun is not None
    long.cancel()


def test_one_that_begins_alike_and_differs_before_the_end_of_what_was_begun_reads_its_own(engine, alone, monkeypatch):
    """And a prompt that ends where another's begun part does keeps a token to read."""
    first, second = ask(LONG + "one two three four five six seven. " * 4), ask(LONG + "eight nine ten. " * 3)
    expected = [alone(request).tokens for request in (first, second)]
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 140)
    waves, prefill = [], engine._scheduler.prefill
    whole = prefill.read
    monkeypatch.setattr(prefill, "read", lambda tickets, *rest: waves.append(prefill.plan(tickets)[1]) or whole(tickets, *rest))
    tickets = [engine.submit(request, keep=False) for request in (first, second)]
    assert [ticket.result().tokens for ticket in tickets] == expected
    (found,) = waves
    assert found[0] is not None and found[1] is None and found[0][0] < len(tickets[1].prompt)

    ended, longer = (engine.submit(request, keep=False) for request in (ask("short"), ask("short and longer")))
    longer.begun = Begun(None, len(ended.prompt), (), 0)
    longer.prompt.identity[: len(ended.prompt)] = ended.prompt.identity
    assert prefill._found(ended, [ended, longer]) is None and prefill._found(longer, [ended, longer]) == (len(ended.prompt), None)
    for ticket in (ended, longer):
        ticket.cancel()


def test_a_conversation_goes_on_from_a_prompt_that_was_read_in_parts(engine, alone, read, monkeypatch):
    """The states behind the picture and at the answer's end are kept, as of a prompt read at once."""
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 50)
    request = ask(LONG, PICTURES[0])
    with monkeypatch.context() as patch:
        ids = [*engine.processor.renderer.encode_plain("a red ball"), engine.processor.renderer.end_of_turn_id]
        patch.setattr(engine._scheduler, "choose", lambda logits, rows: [ids[len(row.said)] for row in rows])
        answer = engine.submit(request).result()
    again = [*request.messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "and now?"}]
    read.clear()
    found = engine.submit(Request(again, max_new_tokens=8)).result()
    assert found.text == alone(Request(again, max_new_tokens=8)).text and sum(read) < 50
    read.clear()
    other = ask("another question", PICTURES[0])
    found = engine.submit(other).result()
    assert found.text == alone(other).text and found.shared_tokens > 30 and sum(read) < 40


def test_a_long_prompt_is_given_up_half_way(engine, alone, read, monkeypatch):
    """Cancelled, or hit by an error of the model: its state is gone and the others are answered."""
    long, short = ask(LONG, PICTURES[0]), ask("short")
    expected = alone(short).text
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 40)
    tickets = [engine.submit(long), engine.submit(short)]
    engine.step()
    engine.step()
    assert tickets[0].begun.length >= 64 and engine._scheduler._held_bytes(Wave([tickets[0]])) == tickets[0].begun.state.size_bytes()
    tickets[0].cancel()
    assert tickets[0].answer.stop_reason == "cancelled" and tickets[0].begun is None
    assert tickets[1].result().text == expected

    for error in (RuntimeError("cannot encode"), KeyboardInterrupt()):
        tickets = [engine.submit(long), engine.submit(short)]
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler.prefill, "read_on", lambda *_, error=error: (_ for _ in ()).throw(error))
            if isinstance(error, Exception):
                engine.step()
            else:
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
        assert tickets[0].answer.stop_reason == "error" and tickets[0].begun is None
        assert tickets[1].result().text == expected and engine._scheduler.is_idle


@pytest.mark.parametrize("rows_of_memory, in_parts", [(6, True), (1.4, False)])
def test_memory_holds_while_parts_are_read(exact_model, tiny_processor, alone, monkeypatch, rows_of_memory, in_parts):
    """With room for its state once only, a prompt is read at once, into its row."""
    request = ask(LONG, PICTURES[0])
    expected = alone(request)
    monkeypatch.setitem(TOKENS_A_STEP, "cpu", 40)
    probe = Engine(exact_model, tiny_processor, self_check=False)._scheduler.cost
    budget = int(rows_of_memory * probe.bytes(1, expected.prompt_tokens + 64))
    small = Engine(exact_model, tiny_processor, memory_bytes=budget * 4 // 3, self_check=False)
    ticket, begun = small.submit(request), 0
    while small.step():
        scheduler = small._scheduler
        held = 0 if scheduler.slots is None else scheduler.slots.size_bytes()
        begun = max(begun, 0 if ticket.begun is None else ticket.begun.length)
        assert held + scheduler._held_bytes(Wave([ticket])) <= scheduler.budget_bytes
    assert ticket.answer.tokens == expected.tokens and (begun > 0) == in_parts


@pytest.mark.parametrize("memory_bytes, least_in_parts", [(2**25, 9), (3 * 2**21, 3), (2**21, 0)])
def test_mixes_with_long_prompts_are_answered_as_one_by_one(exact_model, tiny_processor, monkeypatch, memory_bytes, least_in_parts):
    """Prompts of one part and of many, with common beginnings and without, arriving late, cancelled, going on in a conversation, while what
    a step may read changes; with memory for all, for a few, and for no state twice. No memory is taken beyond it."""
    draw = random.Random(7)
    beginnings = [LONG, LONG[: len(LONG) // 2], "a short one. ", "another tale of two cities and a cat. " * 9]
    requests = []
    for number in range(30):
        pictures = draw.choice([(), (PICTURES[0],), (PICTURES[1], PICTURES[0])])
        wanted = {"score_texts": ("red", "a dozen")} if number % 7 == 0 else {}
        requests.append(ask(f"{draw.choice(beginnings)}{draw.choice('abc')}", *pictures, max_new_tokens=draw.choice((1, 3, 9)), **wanted))
    alone = [Engine(exact_model, tiny_processor, self_check=False, max_batch=1).generate([request])[0] for request in requests]
    engine = Engine(exact_model, tiny_processor, max_batch=8, memory_bytes=memory_bytes, self_check=False)
    tickets, in_parts = [], set()
    while len(tickets) < len(requests) or not engine._scheduler.is_idle:
        monkeypatch.setitem(TOKENS_A_STEP, "cpu", draw.choice((20, 60, 200)))
        more = requests[len(tickets) : len(tickets) + draw.randint(0, 3)]
        tickets += [engine.submit(request, keep=draw.random() < 0.3) for request in more]
        if tickets and draw.random() < 0.1:
            draw.choice(tickets).cancel()
        engine.step()
        scheduler = engine._scheduler
        begun = [ticket for ticket in tickets if ticket.begun is not None]
        in_parts |= {id(ticket) for ticket in begun}
        assert len(begun) <= 1 and all(ticket is scheduler.waiting[0] for ticket in begun)
        held = 0 if scheduler.slots is None else scheduler.slots.size_bytes()
        assert held + scheduler._held_bytes(Wave(begun)) <= scheduler.budget_bytes and engine.kept.bytes <= engine.kept.most_bytes
    for ticket, expected in zip(tickets, alone, strict=True):
        answer = ticket.answer
        if expected.error is not None or answer.error is not None:
            assert memory_bytes == 2**21 and "MB of state" in answer.error
        elif answer.stop_reason == "cancelled":
            assert answer.tokens == expected.tokens[: len(answer.tokens)]
        else:
            assert answer.tokens == expected.tokens
            assert answer.scores == (expected.scores and pytest.approx(expected.scores, abs=1e-4))
            assert 0 <= answer.shared_tokens < answer.prompt_tokens
    assert len(in_parts) >= least_in_parts
