"""What an answer is: that of `model.generate` alone, with scores of given texts, also quantised; checked at start."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.assemble import assemble
from vlm.decoder.serving import ServingDecoder
from vlm.engine import Engine, Request
from vlm.engine.memory import StateCost
from vlm.engine.self_check import check_forked_answer
from vlm.engine.sharing import common_length, plan_pieces

ROOT = Path(__file__).resolve().parents[2]


def noise(seed, width=200, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [noise(1), noise(2, 64, 64), noise(3, 64, 130)]


def ask(words, *pictures, **settings):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return Request([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}], **({"max_new_tokens": 8} | settings))


@pytest.fixture(scope="module")
def engine(exact_model, tiny_processor):
    return Engine(exact_model, tiny_processor)


def inputs(processor, request):
    prepared = processor.prepare(request.messages, add_generation_prompt=True)
    pixels = processor.image_processor.normalize_pixels(prepared.pixels)
    return torch.tensor([prepared.rendered.input_ids]), pixels if len(pixels) else None


def test_greedy_answers_are_those_of_generate_one_by_one(engine, exact_model, tiny_processor):
    """transformers' own loop, one request at a time, on the same weights."""
    draw = random.Random(3)
    requests = [ask(f"question {number}", *draw.choices(PICTURES, k=number % 3), max_new_tokens=10) for number in range(9)]
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        ids, pixels = inputs(tiny_processor, request)
        said = exact_model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
        end = tiny_processor.renderer.end_of_turn_id
        assert list(answer.tokens) == (said[: said.index(end)] if end in said else said)


def test_scores_are_the_log_probabilities_of_the_texts(engine, exact_model, tiny_processor):
    """Of texts of one and of many tokens, for several requests at once, against one plain pass over prompt and text."""
    texts = ("red", "unanswerable", "a long answer of many words, with 12 in it", "")
    requests = [ask("What?", PICTURES[0], score_texts=texts), ask("Hm"), ask("How many?", PICTURES[0], score_texts="unanswerable")]
    answers = engine.generate(requests)
    assert answers[1].scores is None and list(answers[0].scores) == list(texts) and answers[0].scores[""] == 0.0
    for request, answer in ((requests[0], answers[0]), (requests[2], answers[2])):
        ids, pixels = inputs(tiny_processor, request)
        for text in request.score_texts:
            tokens = tiny_processor.renderer.encode_plain(text)
            with torch.no_grad():
                logits = exact_model(
                    input_ids=torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], dim=1), pixel_values=pixels
                ).logits
            logits[..., exact_model.config.image_token_id] = float("-inf")
            log_probabilities = logits[0, ids.shape[1] - 1 : -1].double().log_softmax(-1)
            expected = float(sum(log_probabilities[place, token] for place, token in enumerate(tokens)))
            assert answer.scores[text] == pytest.approx(expected, abs=1e-4)


def test_scoring_changes_no_answer(engine):
    plain, scored = (engine.generate([ask("What?", PICTURES[1], score_texts=texts)])[0] for texts in ((), ("unanswerable", "no way")))
    assert plain.tokens == scored.tokens


def test_random_mixes_get_the_answers_of_single_runs(exact_model, tiny_processor):
    """benchmarks/same_answers.py on a model with random weights: a few mixes of requests, arrivals and cancellations."""
    path = ROOT / "benchmarks" / "same_answers.py"
    spec = importlib.util.spec_from_file_location("same_answers", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    counts = module.compare_mixes(exact_model, tiny_processor, PICTURES, mixes=4, seed=1)
    print({name: value for name, value in counts.items() if name != "wrong"})
    assert counts["wrong"] == [] and counts["near_ties"] == 0
    assert counts["answers"] > 40 and counts["cancelled"] > 3 and counts["shared_tokens"] > 1000


def test_a_planted_leak_between_rows_is_seen_by_the_mixes(exact_model, tiny_processor, monkeypatch):
    """Rows moved without their state: the comparison must be able to fail."""
    from vlm.decoder.slots import Slots

    spec = importlib.util.spec_from_file_location("same_answers", ROOT / "benchmarks" / "same_answers.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    fork = Slots.fork

    def forgets_the_state(self, source, origins, targets):
        fork(self, source, origins, targets)
        for tensor in [*self.ssm.values(), *self.convolution.values(), *self.values.values()]:
            tensor[targets] = 0.0

    monkeypatch.setattr(Slots, "fork", forgets_the_state)
    assert module.compare_mixes(exact_model, tiny_processor, PICTURES, mixes=2, seed=1)["wrong"]


def test_int8_weights_answer_nearly_the_same(tiny_processor):
    """Quantised to a 127th of each row's largest weight: scores move a little, and only the decoder's projections are touched."""
    pytest.importorskip("torchao")
    model, _ = assemble("tiny", seed=2)
    head, encoder = model.get_output_embeddings().weight, next(model.vision_encoder.parameters())
    request = ask("What?", PICTURES[0], score_texts=("red", "unanswerable"))
    exact = Engine(model, tiny_processor).generate([request])[0]
    quantised = Engine(model, tiny_processor, quantize="int8").generate([request])[0]
    assert model.get_output_embeddings().weight is head and next(model.vision_encoder.parameters()) is encoder
    assert "Int8" in type(model.language_model.model.layers[0].mixer.in_proj.weight).__name__
    for text, score in exact.scores.items():
        assert score != quantised.scores[text] and quantised.scores[text] == pytest.approx(score, abs=0.05 * abs(score))


def test_int8_without_torchao_names_the_command(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'nemotron-h-vision\[train\]'"):
        Engine(*tiny, quantize="int8")


def test_the_self_check_finds_a_broken_fork(exact_model, tiny_processor, monkeypatch):
    from vlm.decoder.slots import Slots

    assert check_forked_answer(exact_model, tiny_processor, ServingDecoder(exact_model.language_model)) < 1e-4

    def forgets_the_window(self, source, origins, targets, **how):
        fork(self, source, origins, targets, **how)
        for tensor in self.convolution.values():
            tensor[targets] = 0.0

    fork = Slots.fork
    monkeypatch.setattr(Slots, "fork", forgets_the_window)
    with pytest.raises(RuntimeError, match="the self-check failed"):
        Engine(exact_model, tiny_processor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cost_from_the_configuration_is_that_of_the_buffers(dtype):
    model, _ = assemble("tiny", seed=0)
    model.to(dtype)
    slots = ServingDecoder(model.language_model).slots(3, 128)
    assert StateCost.of(model.config.text_config, dtype).bytes(3, 128) == slots.size_bytes()


def test_a_plan_covers_every_prompt_once_and_shares_only_what_is_equal():
    """500 random families of prompts, with equal ones, prefixes of each other, kept starts and wanted cuts."""
    draw = random.Random(0)
    shared = 0
    for _ in range(500):
        base = [draw.randint(0, 1) for _ in range(80)]
        texts = [
            np.array(base[: draw.choice((0, 5, 30, 30, 30, 60))] + [draw.randint(0, 2) for _ in range(draw.randint(1, 25))])
            for _ in range(draw.randint(1, 9))
        ]
        texts += [texts[0].copy(), texts[0][: max(1, len(texts[0]) - 1)]] if draw.random() < 0.4 else []
        starts = [draw.choice((0, 0, min(4, len(text) - 1))) for text in texts]
        cuts = [tuple(draw.sample(range(1, 90), draw.randint(0, 2))) for _ in texts]
        pieces = plan_pieces(texts, starts, cuts)
        assert sorted(piece.owner for piece in pieces if piece.is_leaf) == list(range(len(texts)))
        for place, piece in enumerate(pieces):
            assert piece.parent is None or piece.parent < place
            assert piece.start == (starts[piece.owner] if piece.parent is None else pieces[piece.parent].end) < piece.end
            assert all(np.array_equal(texts[member][: piece.end], texts[piece.owner][: piece.end]) for member in piece.members)
            assert not piece.is_leaf or piece.end == len(texts[piece.owner])
            shared += len(piece.members) - 1
    assert shared > 1000


def test_the_common_length_of_two_prompts():
    for first, second, expected in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 5, 3], [1, 2, 3], 1), ([4], [5], 0)):
        assert common_length(np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)) == expected


def test_equal_tiles_are_encoded_once_whoever_asks_about_them(engine, exact_model, monkeypatch):
    """A picture behind two system texts shares no prefix; the sky in five tiles of one picture is one tile."""
    plain, seen, encode = Image.new("RGB", (256, 64), "blue"), [], exact_model.encode_tiles
    monkeypatch.setattr(exact_model, "encode_tiles", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    requests = [ask("What?", PICTURES[0], plain), ask("Where?", PICTURES[0])]
    for number, request in enumerate(requests):
        request.messages.insert(0, {"role": "system", "content": f"You are assistant {number}."})
    together = engine.generate(requests)
    picture = engine.processor.image_processor.count_tiles(*PICTURES[0].size)
    assert engine.processor.image_processor.count_tiles(*plain.size) > 2 and sum(seen) == picture + 1
    alone = [Engine(exact_model, engine.processor, self_check=False).generate([request])[0] for request in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


@pytest.mark.gpu
def test_captured_steps_equal_plain_ones(tiny_processor):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, _ = assemble("tiny", seed=2)
    engine = Engine(model.cuda(), tiny_processor)
    requests = [ask(f"question {number}", *PICTURES[: number % 3], max_new_tokens=4 + number) for number in range(7)]
    captured = engine.generate(requests)
    assert engine._scheduler.graphs.reason is None and any(engine._scheduler.graphs._graphs.values())
    engine._scheduler.graphs = None
    assert [answer.tokens for answer in engine.generate(requests)] == [answer.tokens for answer in captured]
