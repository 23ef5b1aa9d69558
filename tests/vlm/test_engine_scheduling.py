"""Who is answered when: late arrivals, cancellation, memory, errors of the model, several threads at once."""

import random
import threading

import pytest
import torch
from engine_requests import PICTURES, ask
from PIL import Image

import vlm.engine.prefill as prefill_module
from vlm.decoder.slots import Slots
from vlm.engine import Engine


@pytest.fixture
def engine(exact_model, tiny_processor):
    return Engine(exact_model, tiny_processor, self_check=False)


@pytest.fixture(scope="module")
def alone(exact_model, tiny_processor):
    """The answer of an engine that has read nothing else."""
    return lambda request: Engine(exact_model, tiny_processor, self_check=False).generate([request])[0]


def endless(engine, monkeypatch, tokens=(50, 51, 52)):
    """The model never ends a turn."""
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, rows: [tokens[len(row.said) % len(tokens)] for row in rows])


def test_late_arrivals_join_the_running_batch(engine, alone):
    """Each of ten requests comes a step after the one before, while those decode: rows of different ages stand side by side."""
    requests = [ask(f"number {number}", *PICTURES[: number % 3], max_new_tokens=12 - number) for number in range(10)]
    tickets, most = [], 0
    for request in requests:
        tickets.append(engine.submit(request))
        engine.step()
        most = max(most, len(engine._scheduler.running))
    assert most > 3
    assert [ticket.result().text for ticket in tickets] == [alone(request).text for request in requests]


def test_rows_are_taken_again_as_others_end(engine, monkeypatch):
    """Eight requests of very different lengths through three rows: every row is used by several, none waits for the longest."""
    endless(engine, monkeypatch)
    engine._scheduler.most_rows = 3
    tickets = [engine.submit(ask("?", max_new_tokens=length)) for length in (30, 2, 3, 2, 4, 2, 3, 2)]
    order = []
    while any(ticket.answer is None for ticket in tickets):
        engine.step()
        assert len(engine._scheduler.running) <= 3 and engine._scheduler.slots.rows <= 4
        order += [place for place, ticket in enumerate(tickets) if ticket.answer is not None and place not in order]
    assert order[-1] == 0 and [ticket.answer.generated_tokens for ticket in tickets] == [30, 2, 3, 2, 4, 2, 3, 2]


def test_a_cancelled_request_ends_with_what_it_has_said(engine, alone, monkeypatch):
    """Running ones free their row, waiting ones are never read, and the others' answers do not change."""
    others = [ask("one", PICTURES[0]), ask("two")]
    tickets = [engine.submit(request) for request in (others[0], ask("gone", max_new_tokens=100), others[1])]
    for _ in range(3):
        engine.step()
    said = list(tickets[1].said)
    tickets[1].cancel()
    waiting = engine.submit(ask("never", PICTURES[1]))
    waiting.cancel()
    assert tickets[1].answer.stop_reason == waiting.answer.stop_reason == "cancelled"
    assert list(tickets[1].answer.tokens) == said and waiting.answer.generated_tokens == 0
    assert len(engine._scheduler.running) <= 2
    assert [tickets[0].result().text, tickets[2].result().text] == [alone(request).text for request in others]
    tickets[0].cancel()  # over already: nothing happens
    assert tickets[0].result().stop_reason != "cancelled"


def test_closing_a_stream_frees_its_row(engine, monkeypatch):
    endless(engine, monkeypatch)
    stream = engine.stream(ask("?", max_new_tokens=1000))
    next(stream)
    assert len(engine._scheduler.running) == 1
    stream.close()
    assert not engine._scheduler.running and engine._scheduler.is_idle


def test_a_stream_nobody_reads_holds_nobody_up(engine, alone):
    """The lock was once held until the generator was closed: one open browser tab stopped the server."""
    stream = engine.stream(ask("first", PICTURES[0], max_new_tokens=12))
    pieces = [next(stream)]
    assert engine.generate([ask("second")])[0].text == alone(ask("second")).text
    assert "".join(pieces + list(stream)) == alone(ask("first", PICTURES[0], max_new_tokens=12)).text


def test_an_interrupted_generate_cancels_what_is_left(engine):
    """on_answer raises (a full disk): nothing may go on in the rows, and the engine must still work."""

    def fail(index, answer):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        engine.generate([ask("?", max_new_tokens=length) for length in (1, 50, 60)], on_answer=fail)
    assert engine._scheduler.is_idle
    assert engine.generate([ask("still there?")])[0].error is None


def test_what_can_never_fit_is_refused_and_the_rest_is_answered(exact_model, tiny_processor, alone):
    """And the refusal says how much there is; a request just below the limit is answered."""
    small = Engine(exact_model, tiny_processor, memory_bytes=2**20, self_check=False)
    budget, cost = small._scheduler.budget_bytes, small._scheduler.cost
    fitting = (budget - cost.row_bytes) // cost.token_bytes - 64
    answers = small.generate([ask("a"), ask("b", max_new_tokens=10**6), ask("c", max_new_tokens=fitting)])
    assert answers[0].text == alone(ask("a")).text and answers[2].error is None
    assert answers[1].stop_reason == "error" and "MB of state; the engine has 0.8 MB" in answers[1].error
    with pytest.raises(ValueError, match="ask for fewer new tokens or give the engine more memory_bytes"):
        next(small.stream(ask("b", max_new_tokens=10**6)))


@pytest.mark.parametrize("memory_bytes", [2**20, 3 * 2**20])
def test_requests_wait_while_the_memory_is_full(exact_model, tiny_processor, alone, memory_bytes):
    """Buffers, shared prefixes and kept states together never take more than was given."""
    small = Engine(exact_model, tiny_processor, memory_bytes=memory_bytes, self_check=False)
    requests = [ask(f"number {number}", *PICTURES[: number % 3], max_new_tokens=4) for number in range(12)]
    tickets, most = [small.submit(request) for request in requests], 0
    while small.step():
        scheduler = small._scheduler
        assert scheduler.slots is None or scheduler.slots.size_bytes() + small.kept.bytes <= memory_bytes
        most = max(most, len(scheduler.running))
    assert [ticket.answer.text for ticket in tickets] == [alone(request).text for request in requests]
    assert 1 <= most < 12


def test_a_fault_of_the_model_hits_only_its_request(engine, alone, exact_model, monkeypatch):
    """One picture cannot be encoded (out of memory, say): it was admitted together with others."""
    encode = exact_model.encode_tiles

    def failing(pixels):
        if float(pixels.flatten(1).amax(1).min()) == 0.0:
            raise torch.OutOfMemoryError("no memory for this picture")
        return encode(pixels)

    monkeypatch.setattr(exact_model, "encode_tiles", failing)
    plain = lambda pixels: (pixels / 255.0).permute(0, 3, 1, 2)  # noqa: E731
    monkeypatch.setattr(engine.processor.image_processor, "normalize_pixels", plain)
    black = Image.new("RGB", (64, 64))
    good = [ask("one"), ask("two", PICTURES[1])]
    answers = engine.generate([good[0], ask("bad", black), good[1]])
    assert answers[1].error == "OutOfMemoryError: no memory for this picture"
    assert [answers[0].text, answers[2].text] == [alone(request).text for request in good]


def test_an_error_while_decoding_becomes_the_answer_of_all_who_ran(engine, alone, monkeypatch):
    """And the engine goes on with fresh buffers."""
    decode = engine._scheduler.decoder.decode
    monkeypatch.setattr(engine._scheduler.decoder, "decode", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("device lost")))
    answers = engine.generate([ask("a"), ask("b")])
    assert {answer.error for answer in answers} == {"RuntimeError: device lost"}
    monkeypatch.setattr(engine._scheduler.decoder, "decode", decode)
    assert engine.generate([ask("a")])[0].text == alone(ask("a")).text


def test_an_interrupt_leaves_no_request_hanging(engine, alone, monkeypatch):
    """Ctrl-C in the middle of a step: the caller gets it, others get an error, nobody waits for ever."""
    other = engine.submit(ask("other", max_new_tokens=50))
    decode = engine._scheduler.decoder.decode
    monkeypatch.setattr(engine._scheduler.decoder, "decode", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask("a")])
    assert "KeyboardInterrupt" in other.result().error
    monkeypatch.setattr(engine._scheduler.decoder, "decode", decode)
    assert engine.generate([ask("a")])[0].text == alone(ask("a")).text


def test_an_interrupt_while_reading_leaves_its_rows_empty(engine, alone, monkeypatch):
    """The buffers may have to be exchanged for narrower ones afterwards, and nobody's tokens may be in the way."""
    choose = engine._scheduler.choose
    other = engine.submit(ask("other", max_new_tokens=30))
    engine.step()
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, tickets: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask(f"about {number}", *PICTURES) for number in range(4)])
    monkeypatch.setattr(engine._scheduler, "choose", choose)
    assert not any(engine._scheduler.slots.counts[1:]) and not any(engine._scheduler.slots.common)
    assert other.result().text == alone(ask("other", max_new_tokens=30)).text
    assert engine.generate([ask("a", PICTURES[0])])[0].text == alone(ask("a", PICTURES[0])).text


def test_no_memory_for_larger_buffers_is_an_error_of_those_it_hits(engine, alone, monkeypatch):
    """Half of the layers have new buffers then, so those who were running cannot go on; whoever comes next can."""
    running = engine.submit(ask("running", max_new_tokens=40))
    engine.step()
    grow, calls = Slots.grow, []

    def half(self, rows, span):
        calls.append(rows)
        if len(calls) == 1:
            layer = next(iter(self.keys))
            self.keys[layer] = self.keys[layer].new_zeros(rows, *self.keys[layer].shape[1:])
            raise torch.OutOfMemoryError("no memory")
        return grow(self, rows, span)

    monkeypatch.setattr(Slots, "grow", half)
    waiting = [ask(f"waiting {number}", PICTURES[0], max_new_tokens=5) for number in range(6)]
    answers = engine.generate(waiting)
    assert calls and running.result().error == "OutOfMemoryError: no memory"
    assert [answer.text for answer in answers] == [alone(request).text for request in waiting]


def test_an_error_behind_reading_costs_the_others_nothing(engine, alone, monkeypatch):
    """Choosing a first token fails for one of a wave: all are read again, one by one, with their pictures."""
    choose = engine._scheduler.choose

    def fails(logits, tickets):
        if any(ticket.request.max_new_tokens == 7 for ticket in tickets):
            raise RuntimeError("no such sampling")
        return choose(logits, tickets)

    monkeypatch.setattr(engine._scheduler, "choose", fails)
    good = [ask("one", PICTURES[0]), ask("two", PICTURES[1])]
    answers = engine.generate([good[0], ask("bad", max_new_tokens=7), good[1]])
    assert answers[1].error == "RuntimeError: no such sampling"
    assert [answers[0].text, answers[2].text] == [alone(request).text for request in good]


def test_numbers_that_are_not_finite_are_an_error_and_stay_in_their_row(engine, alone, monkeypatch):
    choose = engine._scheduler.choose

    def poison(logits, rows):
        for place, row in enumerate(rows):
            if row.request.max_new_tokens == 7:
                logits[place] = float("nan")
        return choose(logits, rows)

    monkeypatch.setattr(engine._scheduler, "choose", poison)
    good, bad = ask("good", PICTURES[1]), ask("bad", max_new_tokens=7)
    answers = engine.generate([bad, good, bad])
    assert "not finite" in answers[0].error and answers[1].text == alone(good).text


def test_many_threads_ask_stream_and_cancel_at_once(engine, alone):
    """As a server does. Requests of all threads are decoded in one batch, and each caller gets its own answer."""
    requests = [ask(f"thread {number}", *PICTURES[: number % 3], max_new_tokens=4 + number) for number in range(8)]
    expected = [alone(request) for request in requests]
    found, together, barrier = [None] * 8, [], threading.Barrier(8)

    def run(number):
        barrier.wait()
        if number % 4 == 3:
            ticket = engine.submit(requests[number])
            for _ in zip(range(2), ticket, strict=False):
                together.append(len(engine._scheduler.running))
            ticket.cancel()
            found[number] = ticket.result()
        elif number % 2:
            found[number] = "".join(engine.stream(requests[number]))
        else:
            found[number] = engine.generate([requests[number]] * 2)[1].text

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, answer in enumerate(found):
        if number % 4 == 3:
            assert expected[number].tokens[: answer.generated_tokens] == answer.tokens
        else:
            assert answer == expected[number].text
    assert engine._scheduler.is_idle


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_for_keeping_a_state_costs_no_answer(exact_model, tiny_processor, alone, monkeypatch, error):
    """The finished request stayed in its row, every later step failed at it again, and the engine never answered anybody any more."""
    mine = Engine(exact_model, tiny_processor, memory_bytes=2**26, self_check=False)
    mine.submit(ask("kept before")).result()
    assert len(mine.kept)

    def full(*_):
        raise error

    monkeypatch.setattr(mine.kept, "keep", full)
    request = ask("kept?", PICTURES[0])
    assert mine.submit(request).result().text == alone(request).text
    assert mine.generate([ask("and then?")])[0].text == alone(ask("and then?")).text
    assert mine._scheduler.is_idle and not len(mine.kept) and mine.kept.bytes == 0


def test_forgetting_waits_for_the_step_under_way(exact_model, tiny_processor, monkeypatch):
    """Kept states were taken away while a step looked through them, which ended it with "dictionary changed size during iteration"."""
    mine = Engine(exact_model, tiny_processor, memory_bytes=2**26, self_check=False)
    mine.submit(ask("kept before")).result()
    within, go_on, seen = threading.Event(), threading.Event(), []
    step = mine._scheduler.step

    def slow():
        within.set()
        go_on.wait(30)
        seen.append(len(mine.kept))
        step()

    monkeypatch.setattr(mine._scheduler, "step", slow)
    asking = threading.Thread(target=lambda: mine.generate([ask("?", max_new_tokens=1)]))
    forgetting = threading.Thread(target=mine.forget)
    asking.start()
    assert within.wait(30)
    forgetting.start()
    forgetting.join(0.2)
    go_on.set()
    asking.join(30)
    forgetting.join(30)
    assert seen[0] > 0 and not len(mine.kept)


def test_times_and_counts_of_an_answer(engine):
    first, second = engine.generate([ask("a?", PICTURES[0]), ask("b?", PICTURES[0])])
    for answer in (first, second):
        assert answer.generated_tokens == len(answer.tokens) and answer.visual_tokens == 4 * 16 < answer.prompt_tokens
        assert 0 < answer.first_token_seconds <= answer.seconds and answer.waited_seconds >= 0
    assert sorted([first.shared_tokens > 0, second.shared_tokens > 0]) == [False, True]


def test_few_free_rows_wait_for_more_when_many_ask(engine, monkeypatch):
    """Reading one prompt for each row that ends would make a hundred small calls of two large ones."""
    endless(engine, monkeypatch)
    engine._scheduler.most_rows = 16
    calls, read = [], prefill_module.Prefill.read
    monkeypatch.setattr(
        prefill_module.Prefill, "read", lambda self, tickets, *rest: calls.append(len(tickets)) or read(self, tickets, *rest)
    )
    draw = random.Random(0)
    engine.generate([ask(f"{number}", max_new_tokens=draw.randint(1, 12)) for number in range(64)])
    assert sum(calls) == 64 and len(calls) <= 16


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"memory_bytes": 0}, {"quantize": "int3"}])
def test_impossible_settings_are_refused(tiny, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Engine(*tiny, **settings)
