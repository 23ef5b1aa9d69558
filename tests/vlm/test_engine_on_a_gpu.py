"""The engine's way on a GPU, on one that is not there (tests/pretend_gpu.py): a processor's answers, from captured steps and others."""

import copy
import threading
import time

import pytest
import torch
from engine_requests import PICTURES, ask

import vlm.engine.decode_graphs as decode_graphs
import vlm.engine.intake as intake
from vlm.decoder.serving import ServingDecoder
from vlm.engine import Engine

REQUESTS = [
    *(ask(f"question {number}", *PICTURES[: number % 3], max_new_tokens=4 + number) for number in range(5)),
    ask("drawn", PICTURES[0], temperature=1.0, seed=7),
    ask("scored", PICTURES[1], score_texts=("red", "a long answer of many words", "")),
]


@pytest.fixture(scope="module")
def expected(exact_model, tiny_processor):
    """(tokens, scores) of each, one by one on a processor."""
    engine = Engine(exact_model, tiny_processor, self_check=False)
    return [(answer.tokens, answer.scores) for request in REQUESTS for answer in engine.generate([request])]


def together(engine):
    """Answers of requests that are all there at the start."""
    tickets = [engine.submit(request, keep=False) for request in REQUESTS]
    return [ticket.result() for ticket in tickets]


class Clock:
    """Says how long plain steps and replays take, for the pretended GPU's own times mean nothing; runs them all the same."""

    plain, replay = 2.0, 1.0

    def __call__(self, act):
        act()
        act()
        return self.replay if getattr(act, "__name__", "") == "replay" else self.plain


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(decode_graphs, "seconds_of", clock)
    return clock


@pytest.fixture
def engine(pretend_gpu, exact_model, tiny_processor):
    return Engine(pretend_gpu.put(copy.deepcopy(exact_model)), tiny_processor)


def agree(answers, expected):
    assert [answer.error for answer in answers] == [None] * len(answers)
    for answer, (tokens, scores) in zip(answers, expected, strict=True):
        assert answer.tokens == tokens
        assert (scores is None) == (answer.scores is None) and (scores is None or answer.scores == pytest.approx(scores))


def test_captured_steps_give_a_processors_answers(engine, pretend_gpu, expected):
    """On a GPU that is not the current one, as the second process of an evaluation has it."""
    agree(engine.generate(REQUESTS), expected)
    graphs = engine._scheduler.graphs
    assert graphs.reason is None and len(graphs._graphs) > 1 and all(len(graph.noted) > 100 for graph, _, _ in graphs._graphs.values())
    assert pretend_gpu.refused == []


def test_requests_come_and_go_while_steps_are_replayed(engine, expected):
    """Late arrivals take the rows that a graph has computed nonsense on, buffers are exchanged as more run, and one is cancelled."""
    tickets = []
    for request in REQUESTS:
        tickets += [engine.submit(request), engine.submit(ask("gone", max_new_tokens=100))]
        engine.step()
        engine.step()
        tickets.pop().cancel()
    agree([ticket.result() for ticket in tickets], expected)
    assert len({generation for generation, _, _ in engine._scheduler.graphs._graphs}) == 1  # those of older buffers are gone


def test_a_conversation_goes_on_from_its_kept_state(engine, exact_model, tiny_processor):
    first = ask("What is it?", PICTURES[0], max_new_tokens=6)
    said = engine.submit(first).result()
    second = ask("And?", max_new_tokens=6)
    turns = [*first.messages, {"role": "assistant", "content": said.text}, *second.messages]
    request = type(second)(turns, max_new_tokens=6)
    answer = engine.submit(request).result()
    alone = Engine(exact_model, tiny_processor, self_check=False).generate([request])[0]
    assert answer.tokens == alone.tokens and answer.shared_tokens > 0 == alone.shared_tokens


def test_what_is_no_faster_captured_runs_as_it_is(engine, expected, clock):
    """Found out by running both: not one state has moved by it, nor is it asked again."""
    clock.replay = clock.plain
    agree(together(engine), expected)
    graphs = engine._scheduler.graphs
    assert graphs.reason is None and len(graphs._graphs) > 1 and not any(graphs._graphs.values())
    assert set(graphs.measured.values()) == {(2.0, 2.0)}
    measured = dict(graphs.measured)
    clock.replay = 1.0
    agree(together(engine), expected)
    assert graphs.measured == measured


def test_the_plain_step_that_is_measured_is_the_one_that_would_run(engine, monkeypatch, clock):
    """Rows that stand level need no mask, which makes a step quicker."""
    asked, measured, plain = [], [], engine._scheduler.graphs.decode

    def noting(tokens, slots, span, *, even=False):
        asked.append((len(tokens), span, even))
        return plain(tokens, slots, span, even=even)

    def measuring(act):
        with monkeypatch.context() as patch:
            step = ServingDecoder.decode
            patch.setattr(ServingDecoder, "decode", lambda self, tokens, slots, span, even=False: measured.append(
                (len(tokens), span, even)) or step(self, tokens, slots, span, even=even))  # fmt: skip
            return clock(act)

    monkeypatch.setattr(engine._scheduler.graphs, "decode", noting)
    monkeypatch.setattr(decode_graphs, "seconds_of", measuring)
    for number in (3, 5):
        for ticket in [engine.submit(ask("level", max_new_tokens=3), keep=False) for _ in range(number)]:
            ticket.result()
    engine.generate([ask("one"), ask("one and another")])
    assert measured and set(measured) <= set(asked) and {even for _, _, even in measured} == {True, False}


def test_each_size_of_batch_is_measured_for_itself(engine, expected, monkeypatch, clock):
    """A replay of eight rows is slower than a plain step here, one of fewer is faster."""
    rows = []
    plain = decode_graphs.DecodeGraphs._capture

    def noting(self, key, *rest):
        clock.replay = 3.0 if key[1] == 8 else 1.0
        rows.append(key[1])
        return plain(self, key, *rest)

    monkeypatch.setattr(decode_graphs.DecodeGraphs, "_capture", noting)
    agree(together(engine), expected)
    found = {key[1]: graph is not None for key, graph in engine._scheduler.graphs._graphs.items()}
    assert found == {size: size != 8 for size in found} and len(found) > 1 and 8 in found
    assert {size for size, _ in engine._scheduler.graphs.measured} == set(rows)


def test_prompts_are_prepared_beside_the_steps(engine, expected, monkeypatch):
    """In another thread, so that the device does not wait for pictures to be tiled; and errors are told of the request that has them."""
    prepare, threads = engine._prepare, set()

    def noting(numbered):
        threads.add(threading.current_thread())
        return prepare(numbered)

    monkeypatch.setattr(engine, "_prepare", noting)
    broken = ask("broken", "no such file.png")
    answers = engine.generate([REQUESTS[0], broken, *REQUESTS[1:]])
    assert "no such file.png" in answers.pop(1).error
    agree(answers, expected)
    assert threading.current_thread() not in threads and len(threads) == 1
    assert not any(thread.is_alive() for thread in threads)


def test_questions_about_a_picture_are_read_together_though_prompts_come_one_by_one(engine, monkeypatch):
    """The preparing thread is slower than a step here; none is read alone for that, and each picture is read once."""
    prepare, waves, read = engine._prepare, [], engine._scheduler.prefill.read

    def slowly(request):
        time.sleep(0.01)
        return prepare(request)

    monkeypatch.setattr(engine, "_prepare", slowly)
    monkeypatch.setattr(engine._scheduler.prefill, "read", lambda wave, *rest: waves.append(len(wave)) or read(wave, *rest))
    answers = engine.generate([ask(f"{number}?", PICTURES[number // 6], max_new_tokens=2) for number in range(12)])
    assert waves == [12] and [answer.shared_tokens == 0 for answer in answers] == [number % 6 == 0 for number in range(12)]


class Opened:
    """Requests whose pictures are opened meanwhile: what has not come yet is not to be waited for."""

    def __init__(self, requests):
        self.requests, self.asked, self.come = list(requests), 0, 40

    def __iter__(self):
        return self

    @property
    def can_go_on(self):
        return self.asked < self.come or self.asked == len(self.requests)

    def __next__(self):
        if self.asked == len(self.requests):
            raise StopIteration
        assert self.asked < self.come
        self.asked += 1
        return self.requests[self.asked - 1]


def test_pictures_are_read_whole_while_others_are_under_way(engine, monkeypatch):
    """Prompts come one by one and steps go on: taken as they come, a picture would be read for its first question and for its second."""
    prepare, waves, read = engine._prepare, [], engine._scheduler.prefill.read

    def slowly(request):
        time.sleep(0.02)
        return prepare(request)

    def noting(wave, *rest):
        waves.append(len(wave))
        return read(wave, *rest)

    monkeypatch.setattr(engine, "_prepare", slowly)
    monkeypatch.setattr(engine._scheduler.prefill, "read", noting)
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, tickets: [7] * len(tickets))
    engine.generate([ask(f"{number}?", max_new_tokens=40) for number in range(2 * intake.TAKEN_TOGETHER + 5)])
    # The last five are taken as they come when nobody is answered meanwhile, which is a matter of time.
    assert min(waves[:2]) >= intake.TAKEN_TOGETHER and sum(waves) == 2 * intake.TAKEN_TOGETHER + 5


def test_what_comes_while_steps_are_made_is_taken_before_anything_is_answered(engine, monkeypatch):
    """And the last ones, fewer than are taken together, are not held back until all others are done."""
    opened = Opened(ask(f"{number}?", max_new_tokens=30) for number in range(90))
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, tickets: [7] * len(tickets))
    step, running = engine._scheduler.step, []

    def slowly():
        step()
        time.sleep(0.005)
        running.append(len(engine._scheduler.running))
        opened.come = min(opened.come + 25, 90)

    monkeypatch.setattr(engine._scheduler, "step", slowly)
    engine.generate(opened)
    assert max(running) == 90


def test_a_pool_is_made_anew_when_no_graph_lives_in_it(engine, expected, clock, monkeypatch):
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(len(pools)) or pools[-1])
    used, plain = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, **rest: used.append(pool) or plain(graph, pool=pool, **rest))
    clock.replay = clock.plain
    agree(together(engine), expected)
    assert len(used) > 1 and used == pools  # every graph was given up, and its pool with it
    clock.replay, count = 1.0, len(used)
    engine._scheduler.graphs._graphs.clear()
    agree(together(engine), expected)
    assert len(used) - count > 1 and len(set(used[count:])) == 1


def test_few_graphs_are_kept(engine, expected, monkeypatch):
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 2)
    agree(engine.generate(REQUESTS), expected)
    assert len(engine._scheduler.graphs._graphs) == 2


def test_a_step_that_asks_the_host_runs_as_it_is(engine, pretend_gpu, expected, monkeypatch):
    """It is found out behind the warm-up, which has moved every state by a token by then."""
    plain = ServingDecoder.logits

    def curious(self, hidden):
        return plain(self, hidden) * float(hidden.isfinite().any())

    monkeypatch.setattr(ServingDecoder, "logits", curious)
    agree(engine.generate(REQUESTS), expected)
    graphs = engine._scheduler.graphs
    assert "_local_scalar_dense" in graphs.reason and not graphs._graphs and len(pretend_gpu.refused) == 1


def test_without_memory_for_a_graph_steps_run_as_they_are_until_buffers_change(engine, expected, monkeypatch):
    capture, tried = decode_graphs.DecodeGraphs._capture, []

    def without_memory(self, key, *rest):
        tried.append(key[0])
        if key[0] == tried[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(self, key, *rest)

    monkeypatch.setattr(decode_graphs.DecodeGraphs, "_capture", without_memory)
    first = engine.submit(REQUESTS[0])
    engine.step()
    agree([first.result()], expected[:1])
    graphs = engine._scheduler.graphs
    assert tried == [tried[0]] and not graphs._graphs and graphs.reason is None
    agree(engine.generate(REQUESTS), expected)  # in larger buffers
    assert len(set(tried)) > 1 and graphs._graphs


def test_in_bfloat16_replayed_steps_are_the_plain_ones(pretend_gpu, tiny_model, tiny_processor):
    """What a GPU will serve in; against a processor's answers roundings would tell."""
    engine = Engine(pretend_gpu.put(copy.deepcopy(tiny_model).to(torch.bfloat16)), tiny_processor)
    captured = engine.generate(REQUESTS)
    assert engine._scheduler.graphs.reason is None and engine._scheduler.graphs._graphs
    engine._scheduler.graphs = None
    assert [answer.tokens for answer in engine.generate(REQUESTS)] == [answer.tokens for answer in captured]
    assert any(len(answer.tokens) > 2 for answer in captured)
