"""Conversations go on from kept states, and pictures and system texts are read once, without any answer changing."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.decoder.serving import ServingDecoder
from vlm.engine import Engine, Request
from vlm.engine.kept_states import KeptStates


def noise(seed, width=200, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(*turns, picture=None, **settings):
    """Turns of user and assistant by turns; the picture stands in the first."""
    messages = [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(turns)]
    if picture is not None:
        messages[0]["content"] = [{"type": "image", "image": picture}, {"type": "text", "text": turns[0]}]
    return Request(messages, **({"max_new_tokens": 6} | settings))


@pytest.fixture
def engine(exact_model, tiny_processor):
    return Engine(exact_model, tiny_processor, self_check=False)


@pytest.fixture
def fresh(exact_model, tiny_processor):
    return lambda request: Engine(exact_model, tiny_processor, self_check=False).generate([request])[0]


def say(engine, monkeypatch, words):
    ids = [*engine.processor.renderer.encode_plain(words), engine.processor.renderer.end_of_turn_id]
    monkeypatch.setattr(engine._scheduler, "choose", lambda logits, rows: [ids[len(row.said)] for row in rows])


def test_the_next_turn_reads_only_what_is_new(engine, fresh, exact_model, monkeypatch):
    """Nothing of the picture, the question or the answer is computed again, and the answer is that of reading everything."""
    picture = noise(1)
    choose = engine._scheduler.choose
    say(engine, monkeypatch, "a red ball")
    first = engine.submit(talk("What is it?", picture=picture, max_new_tokens=30)).result()
    monkeypatch.setattr(engine._scheduler, "choose", choose)
    monkeypatch.setattr(exact_model, "encode_tiles", lambda pixels: pytest.fail("the picture was encoded again"))
    turns = ("What is it?", first.text, "And where?")
    second = engine.submit(talk(*turns, picture=picture)).result()
    monkeypatch.undo()
    assert first.text == "a red ball"
    assert second.shared_tokens == first.prompt_tokens + first.generated_tokens  # all but the end of the turn, which was never read
    expected = fresh(talk(*turns, picture=picture))
    assert (second.text, second.tokens) == (expected.text, expected.tokens)


def test_a_turn_cut_by_length_goes_on_too(engine, fresh):
    """The last token said was never read: the kept state ends before it."""
    first = engine.submit(talk("Tell.", max_new_tokens=5)).result()
    again = talk("Tell.", first.text, "More?")
    found, expected = engine.submit(again).result(), fresh(again)
    assert found.tokens == expected.tokens and found.shared_tokens <= first.prompt_tokens + 4


def test_two_ways_on_from_one_state(engine, fresh):
    """A kept state is copied, not used up: asking differently the second time must not see the first time."""
    picture = noise(2)
    engine.submit(talk("What?", picture=picture)).result()
    ways = [talk("What?", "a dog", question, picture=picture) for question in ("Where is it?", "How many?", "Where is it?")]
    found = [engine.submit(way).result() for way in ways]
    assert [answer.tokens for answer in found] == [fresh(way).tokens for way in ways]
    assert all(answer.shared_tokens > 4 * 16 for answer in found)


def test_another_picture_in_the_same_place_is_not_taken_for_it(engine, fresh):
    """Same file name, same size, same words: the pixels decide. The object is changed in place, the worst case."""
    picture = noise(3)
    engine.submit(talk("What?", picture=picture)).result()
    picture.paste(noise(4))
    changed = engine.submit(talk("What?", picture=picture, score_texts="red")).result()
    expected = fresh(talk("What?", picture=picture, score_texts="red"))
    assert changed.shared_tokens < 16
    assert changed.scores["red"] == pytest.approx(expected.scores["red"], abs=1e-5)


def test_a_changed_file_is_read_again(engine, tmp_path):
    path = tmp_path / "picture.png"
    answers = []
    for seed in (5, 6):
        noise(seed).save(path)
        answers.append(engine.generate([talk("What?", picture=str(path), score_texts="red")])[0].scores["red"])
    assert abs(answers[0] - answers[1]) > 1e-6


def test_a_system_text_is_shared_between_conversations(engine, fresh):
    system = {"role": "system", "content": "Answer in one word. " * 12}
    requests = [Request([system, {"role": "user", "content": text}], max_new_tokens=6) for text in ("one", "two", "three")]
    found = [engine.submit(request).result() for request in requests]
    assert found[0].shared_tokens == 0 and min(answer.shared_tokens for answer in found[1:]) > 40
    assert [answer.tokens for answer in found] == [fresh(request).tokens for request in requests]


def test_a_picture_asked_about_in_a_later_call_is_kept(engine):
    """An evaluation in small batches: the second call sees that the picture came up before, the third goes on from it."""
    picture = noise(7)
    shared = [engine.generate([talk(f"question {number}", picture=picture)])[0].shared_tokens for number in range(3)]
    assert shared[:2] == [0, 0] and shared[2] > 4 * 16


def test_the_store_keeps_within_its_bytes_and_drops_the_oldest(exact_model):
    decoder = ServingDecoder(exact_model.language_model)

    def state(length):
        slots = decoder.slots(1, length)
        slots.advance([0], [length])
        return slots

    size = state(10).size_bytes()
    store = KeptStates(3 * size)
    texts = [np.arange(10) + 100 * number for number in range(4)]
    for text in texts[:3]:
        store.keep(text, state(10))
    assert store.find(np.append(texts[0], 7))[0] == 10  # used just now, so the second one is the oldest
    store.keep(texts[3], state(10))
    found = [store.find(np.append(text, 7)) is not None for text in texts]
    assert found == [True, False, True, True] and store.bytes == 3 * size and len(store) == 3
    store.keep(np.arange(10_000), state(10_000))  # larger than all of it: not kept, and nobody has to go for it
    assert len(store) == 3
    store.clear()
    assert store.bytes == 0 and store.find(np.append(texts[0], 7)) is None


def test_only_a_true_prefix_is_found_and_the_longest(exact_model):
    decoder = ServingDecoder(exact_model.language_model)
    store = KeptStates(2**30)
    for length in (3, 6):
        slots = decoder.slots(1, length)
        store.keep(np.arange(length), slots)
    assert store.find(np.arange(7))[0] == 6
    assert store.find(np.arange(6))[0] == 3  # a prompt needs a token to read
    assert store.find(np.array([0, 1, 9, 3, 4, 5, 6])) is None
    assert store.find(np.arange(3)) is None


def test_forgetting_after_a_change_of_weights(tiny_processor):
    from vlm.assemble import assemble

    model, _ = assemble("tiny", seed=4)
    engine, request = Engine(model, tiny_processor, self_check=False), talk("What?", picture=noise(8), score_texts="red")
    engine.submit(request).result()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(1.3)
    engine.forget()
    found, expected = engine.submit(request).result(), Engine(model, tiny_processor, self_check=False).generate([request])[0]
    assert found.shared_tokens == 0 and found.scores["red"] == pytest.approx(expected.scores["red"], abs=1e-4)
