"""The engine: batched = single, shared pictures = separate, seeds, stops, streams, and a bad request that hurts nobody else."""

import random
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.engine import Answer, Engine, Request, intake


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [noise(200, 64, 1), noise(64, 64, 2), noise(64, 130, 3)]


def ask(words, *pictures, **settings):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return Request([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}], **({"max_new_tokens": 8} | settings))


@pytest.fixture(scope="module")
def engine(exact_model, tiny_processor):
    return Engine(exact_model, tiny_processor)


def texts(answers):
    return [answer.text for answer in answers]


def test_batched_answers_equal_single_ones(engine):
    """Random mixes of pictures, text and lengths: padding and batch mates must be invisible to the letter."""
    generator = random.Random(0)
    requests = []
    for _ in range(9):
        pictures = generator.choices(PICTURES, k=generator.choice((0, 0, 1, 1, 2)))
        words = " ".join(generator.choices(["red", "What", "is it?", "how many", "\n", "x"], k=generator.randint(0, 12)))
        requests.append(ask(words, *pictures, max_new_tokens=generator.randint(1, 12)))
    single = [engine.generate([request])[0] for request in requests]
    batched = engine.generate(requests)
    assert texts(batched) == texts(single)
    for one, other in zip(single, batched, strict=True):
        assert (one.stop_reason, one.prompt_tokens, one.visual_tokens, one.generated_tokens) == (
            other.stop_reason, other.prompt_tokens, other.visual_tokens, other.generated_tokens
        )  # fmt: skip
    assert len(set(texts(single))) > 4


def test_small_batches_equal_large_ones(exact_model, tiny_processor, engine):
    requests = [ask(f"{number}?", *PICTURES[: number % 3]) for number in range(5)]
    assert texts(Engine(exact_model, tiny_processor, max_batch=2).generate(requests)) == texts(engine.generate(requests))


def test_requests_may_be_made_as_they_are_taken(exact_model, tiny_processor, engine):
    """More than memory would hold: no more are open than twice the batch, and a picture is let go of once it is tiled."""
    expected = [engine.generate([ask(f"{number}?", noise(200, 64, number), max_new_tokens=3)])[0].tokens for number in range(12)]
    small = Engine(exact_model, tiny_processor, max_batch=2, self_check=False)
    pictures, answered, most_open, most_alive = [], [], 0, 0

    def made():
        nonlocal most_open, most_alive
        for number in range(12):
            alive = sum(each() is not None for each in pictures)
            most_open, most_alive = max(most_open, number - len(answered)), max(most_alive, alive)
            picture = noise(200, 64, number)
            pictures.append(weakref.ref(picture))
            yield ask(f"{number}?", picture, max_new_tokens=3)
            del picture

    small._prompter.most_bytes = 0  # it would remember some
    answers = small.generate(made(), on_answer=lambda index, answer: answered.append(index))
    assert [answer.tokens for answer in answers] == expected
    assert sorted(answered) == list(range(12)) and most_open <= 5 and most_alive <= 3


def test_questions_of_a_list_are_asked_picture_by_picture(exact_model, tiny_processor):
    """And of anything else in its order: whoever makes them one by one has put them side by side."""
    requests = [ask(f"{number}?", PICTURES[number % 2], max_new_tokens=1) for number in range(6)]
    single = Engine(exact_model, tiny_processor, max_batch=1, self_check=False)
    order = []
    for given in (requests, iter(requests)):
        answers = single.generate(given, on_answer=lambda index, answer: order.append(index))
        assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in answers[:2]] * 3
    assert order == [0, 2, 4, 1, 3, 5, 0, 1, 2, 3, 4, 5]


def test_remembered_pictures_count_with_their_size(exact_model, tiny_processor):
    """A photograph is larger than its tiles, and stays in memory while they are known by it."""
    engine = Engine(exact_model, tiny_processor, self_check=False)
    prompter, photo = engine._prompter, noise(1000, 800)
    prompter.prepare(ask("?", photo).messages, None)
    tiles = sum(tiles.pixels.numel() for tiles, _, _ in prompter._tiles.values())
    assert prompter._bytes == tiles + 1000 * 800 * 4 and len(prompter._tiles) == 1
    prompter.most_bytes = 10  # the last one stays all the same
    prompter.prepare(ask("?", noise(1000, 800, 1).convert("L")).messages, None)
    assert len(prompter._tiles) == 1 and prompter._bytes == tiles + 1000 * 800
    prompter.forget()
    assert prompter._bytes == 0


def test_the_tiles_of_a_picture_count_once_while_they_wait(exact_model, tiny_processor, monkeypatch):
    """Thirty questions about one picture hold it once, so that all of them may be in the queue."""
    engine, picture = Engine(exact_model, tiny_processor, self_check=False), noise(200, 64)
    bytes_of_one = engine._prompter.prepare(ask("?", picture).messages, None).pixels.numel()
    monkeypatch.setattr(intake, "MOST_AHEAD_BYTES", bytes_of_one + 1)
    waves, read = [], engine._scheduler.prefill.read
    monkeypatch.setattr(engine._scheduler.prefill, "read", lambda wave, *rest: waves.append(len(wave)) or read(wave, *rest))
    engine.generate([ask(f"{number}?", picture, max_new_tokens=1) for number in range(30)])
    assert waves == [30]
    waves.clear()
    engine.generate([ask(f"{number}?", noise(200, 64, number), max_new_tokens=1) for number in range(6)])
    assert waves == [2, 2, 2]


def test_an_error_of_who_makes_the_requests_ends_the_others(engine):
    answered = []

    def made():
        yield from (ask(f"{number}?", max_new_tokens=2) for number in range(3))
        raise OSError("no more of them")

    with pytest.raises(OSError, match="no more of them"):
        engine.generate(made(), on_answer=lambda index, answer: answered.append(index))
    assert engine._scheduler.is_idle
    assert texts(engine.generate([ask("and now?")]))[0] is not None


def test_questions_about_one_picture_share_its_work(engine, exact_model, tiny_processor, monkeypatch):
    """Encoded once, answered as if alone; another picture of the same size is not taken for it."""
    requests = [ask(f"question {number}", PICTURES[0]) for number in range(4)] + [ask("question 0", noise(200, 64, 7))]
    single = [engine.generate([request])[0].text for request in requests]
    tiles = []
    encode = exact_model.encode_tiles
    monkeypatch.setattr(exact_model, "encode_tiles", lambda pixels: tiles.append(len(pixels)) or encode(pixels))
    answers = Engine(exact_model, tiny_processor, self_check=False).generate(requests)
    assert texts(answers) == single
    assert sum(tiles) == 2 * 4  # two pictures of three tiles and a thumbnail each
    own, *others, alone = (answer.shared_tokens for answer in answers)
    assert own == alone == 0 and min(others) > 4 * 16  # one of the four reads the picture, the others go on from there


def test_a_conversation_with_earlier_answers_is_read_whole(engine):
    """The second turn must depend on the first."""
    picture = {"type": "image", "image": PICTURES[0]}

    def second(first_answer):
        turns = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": first_answer}]
        return Request([*turns, {"role": "user", "content": "And?"}], max_new_tokens=1, score_texts="red")

    # A model with random weights may well say the same to both, so a probability is compared before it is rounded to a word.
    first, other = engine.generate([second("a red ball"), second("blue blue blue")])
    assert abs(first.scores["red"] - other.scores["red"]) > 1e-3


def say(engine, monkeypatch, words: str, then: str = "end"):
    """Make the model say these words whatever it is asked (then end, or repeat them)."""
    tokenizer, end = engine.processor.tokenizer, engine.processor.renderer.end_of_turn_id
    ids = tokenizer.encode(words, add_special_tokens=False)

    def choose(logits, rows):
        return [(ids + [end])[len(row.said)] if then == "end" else ids[len(row.said) % len(ids)] for row in rows]

    monkeypatch.setattr(engine._scheduler, "choose", choose)
    return ids


def test_the_end_of_turn_ends_an_answer_and_is_not_part_of_it(engine, monkeypatch):
    ids = say(engine, monkeypatch, "a red ball")
    (answer,) = engine.generate([ask("?", max_new_tokens=50)])
    assert (answer.text, answer.stop_reason, answer.generated_tokens) == ("a red ball", "end", len(ids))


def test_max_new_tokens_is_kept_to_the_token(engine, monkeypatch):
    say(engine, monkeypatch, "red ", then="again")
    for most in (1, 2, 7):
        (answer,) = engine.generate([ask("?", max_new_tokens=most)])
        assert (answer.generated_tokens, answer.stop_reason) == (most, "length")


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [(("ball",), "a red ", "stop"), (("l i", "red"), "a ", "stop"), (("zzz",), "a red ball is here", "end"),
     (("",), "a red ball is here", "end"),
     ("ball is", "a red ", "stop"), (("all", "ball"), "a red ", "stop")],
)  # fmt: skip
def test_a_stop_text_ends_an_answer_before_itself(engine, monkeypatch, stop, expected, reason):
    """Also across tokens; of two that come together, the earlier one counts."""
    say(engine, monkeypatch, "a red ball is here")
    (answer,) = engine.generate([ask("?", max_new_tokens=50, stop=stop)])
    assert (answer.text, answer.stop_reason) == (expected, reason)
    assert "".join(engine.stream(ask("?", max_new_tokens=50, stop=stop))) == expected


@pytest.mark.parametrize("words", ["a red ball", "日本語 🙂 é", "x", "ends with a broken \ufffd"])
def test_streamed_pieces_join_to_the_answer(engine, monkeypatch, words):
    """A character of several tokens must not be sent in halves, and nothing sent may be taken back."""
    say(engine, monkeypatch, words)
    pieces = list(engine.stream(ask("?", PICTURES[0], max_new_tokens=80)))
    assert "".join(pieces) == words == engine.generate([ask("?", PICTURES[0], max_new_tokens=80)])[0].text
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces[:-1])


def test_a_stream_cut_by_length_equals_generate(engine, monkeypatch):
    """In the middle of a character, the answer ends in the replacement mark: in both ways alike."""
    ids = say(engine, monkeypatch, "🙂🙂")
    for most in range(1, len(ids)):
        request = ask("?", max_new_tokens=most)
        assert "".join(engine.stream(request)) == engine.generate([request])[0].text


def test_streams_equal_generate_for_the_model_s_own_words(engine):
    for number in range(2):
        request = ask(f"say {number}", *PICTURES[:number], max_new_tokens=12, temperature=1.0, seed=number)
        assert "".join(engine.stream(request)) == engine.generate([request])[0].text


def test_a_seed_draws_the_same_answer_whatever_stands_beside_it(engine):
    """Answers of a server must not depend on who else is asking."""
    drawn = ask("tell", PICTURES[0], temperature=1.0, top_p=0.9, seed=5, max_new_tokens=12)
    alone = engine.generate([drawn])[0].text
    mates = [ask("x", temperature=1.0, seed=1), ask("hm", PICTURES[1]), ask("y", temperature=2.0)]
    assert texts(engine.generate([*mates[:2], drawn, mates[2]]))[2] == alone
    others = {
        engine.generate([ask("tell", PICTURES[0], temperature=1.0, top_p=0.9, seed=seed, max_new_tokens=12)])[0].text for seed in range(4)
    }
    assert len(others) > 1


def test_without_a_seed_the_caller_s_generator_decides(engine):
    """torch.seed() would set the whole process to a random state: nothing after it could be repeated."""

    def draw():
        torch.manual_seed(11)
        return engine.generate([ask("tell", temperature=1.5)])[0].text, torch.rand(1).item()

    assert draw() == draw()


def test_a_small_top_p_or_temperature_is_greedy(engine):
    greedy = engine.generate([ask("tell", PICTURES[0])])[0].text
    for settings in ({"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-30}, {"temperature": 0.0, "top_p": 0.5}):
        assert engine.generate([ask("tell", PICTURES[0], seed=3, **settings)])[0].text == greedy


def test_a_failing_request_hurts_nobody_else(engine, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    good = [ask("What?", PICTURES[0]), ask("And?")]
    bad = {
        "no image at": ask("?", "nowhere.png"),
        "not a readable image": ask("?", tmp_path / "broken.png"),
        "expected a path": ask("?", None),
        "no messages": Request([]),
        "role 'robot'": Request([{"role": "robot", "content": "x"}]),
    }
    answers = engine.generate([good[0], *bad.values(), good[1]])
    assert texts([answers[0], answers[-1]]) == [engine.generate([request])[0].text for request in good]
    for message, answer in zip(bad, answers[1:-1], strict=True):
        assert message in answer.error and answer.text == "" and answer.stop_reason == "error"
    assert answers[0].error is None
    with pytest.raises(ValueError, match="no image at nowhere.png"):
        list(engine.stream(ask("?", "nowhere.png")))


def test_half_a_pair_of_surrogates_is_an_error_of_its_request(engine):
    """As a broken escape in a JSON file leaves it; the tokenizer raises something else than ValueError."""
    answers = engine.generate([ask("good"), ask("bad \ud83d")])
    assert answers[0].error is None and "which is no character; expected valid Unicode" in answers[1].error


def test_a_text_too_long_is_an_error_and_a_picture_too_large_loses_tiles(exact_model, tiny_processor):
    short = Engine(exact_model, tiny_processor, max_tokens=60)
    long, wide = short.generate([ask("word " * 100), ask("?", noise(384, 64))])
    assert "at most 60 fit" in long.error and wide.error is None and wide.prompt_tokens <= 60


def test_answers_are_told_as_they_come(engine):
    told = {}
    answers = engine.generate([ask("a"), Request([]), ask("b", PICTURES[1])], on_answer=told.__setitem__)
    assert told == dict(enumerate(answers)) and all(isinstance(answer, Answer) for answer in answers)


def test_no_request_gives_no_answer(engine):
    assert engine.generate([]) == []


def test_only_broken_requests_are_answered_too(engine):
    assert [answer.stop_reason for answer in engine.generate([Request([]), Request([])])] == ["error", "error"]


def test_a_placeholder_is_never_said(engine, exact_model, monkeypatch):
    """Said by an untrained or a hot model it would need a tile, and stop the whole batch."""
    head, token = exact_model.get_output_embeddings(), exact_model.config.image_token_id
    monkeypatch.setattr(
        head, "forward", lambda hidden: torch.nn.functional.linear(hidden, head.weight).index_fill(-1, torch.tensor([token]), 1e4)
    )
    answers = engine.generate([ask("?"), ask("?", PICTURES[0], temperature=1.0, seed=0)])
    assert [answer.error for answer in answers] == [None, None] and all(answer.generated_tokens for answer in answers)


def test_threads_take_turns(engine):
    """Two at once on one model would mix; each must get its own answer."""
    requests = [ask(f"thread {number}", *PICTURES[: number % 2]) for number in range(4)]
    expected = [engine.generate([request])[0].text for request in requests]
    found = [None] * 4

    def run(number):
        found[number] = engine.generate([requests[number]])[0].text if number % 2 else "".join(engine.stream(requests[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "expected temperature >= 0"),
        ({"temperature": float("nan")}, "expected temperature >= 0"),
        ({"temperature": float("inf")}, "expected temperature >= 0"),
        ({"temperature": "hot"}, "expected temperature >= 0"),
        ({"stop": (5,)}, r"stop is \(5,\); expected texts"),
        ({"score_texts": {"a": 1}}, "score_texts is {'a': 1}; expected texts"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": float("nan")}, "0 < top_p <= 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ask("?", **settings)


def test_an_engine_for_no_request_is_refused(tiny):
    with pytest.raises(ValueError, match="max_batch = 0"):
        Engine(*tiny, max_batch=0)


def test_a_folder_becomes_an_engine(tiny_folder, tiny):
    loaded = Engine.from_pretrained(tiny_folder, max_batch=3)
    request = ask("What?", PICTURES[0])
    assert loaded.max_batch == 3 and texts(loaded.generate([request])) == texts(Engine(*tiny).generate([request]))
