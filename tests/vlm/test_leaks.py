"""Nothing leaks, and the doctor would see it: faults are planted in our own code, one by one, and the check made for each must fail."""

import random

import pytest
import torch

import vlm.decoder.attention as attention
import vlm.decoder.mixer as mixer
from vlm.decoder.attention import HybridAttention
from vlm.decoder.state import DecoderState
from vlm.doctor import answers, separation
from vlm.doctor.check import worst_position
from vlm.doctor.examination import small_model
from vlm.doctor.samples import Sample, draw_samples, noise, pack, places


@pytest.fixture(scope="module")
def patient():
    """(model, processor, samples) in float32, sound."""
    model, processor = small_model()
    return model.eval(), processor, draw_samples(processor, torch.device("cpu"))


def failed(checks):
    return {check.name for check in checks if not check.ok}


def states_run_on(monkeypatch):
    scan = mixer.chunk_scan
    monkeypatch.setattr(mixer, "chunk_scan", lambda *args, **kwargs: scan(*args, **(kwargs | {"seq_idx": None})))


def windows_reach_over_borders(monkeypatch):
    plain, convolve = mixer.Layout, mixer.causal_convolution

    def forgetful(x, weight, bias, layout, state=None, **how):
        y, _ = convolve(x, weight, bias, plain(lengths=(x.shape[1],)) if layout.is_packed else layout, state, **how)
        return y, _

    monkeypatch.setattr(mixer, "causal_convolution", forgetful)


def attention_sees_the_whole_row(monkeypatch):
    monkeypatch.setattr(HybridAttention, "_packed", lambda self, query, key, value, layout: self._attend(query, key, value, None))


def padding_has_a_time_step(monkeypatch):
    scan = mixer.chunk_scan

    def decaying(x, dt, *args, **kwargs):
        return scan(x, torch.where(dt == 0, torch.full_like(dt, 0.5), dt), *args, **kwargs)

    monkeypatch.setattr(mixer, "chunk_scan", decaying)


def attention_sees_padding(monkeypatch):
    masked = HybridAttention._mask_over_slots

    def careless(slots, layout, query):
        return masked(slots, attention.Layout(lengths=layout.lengths), query)

    monkeypatch.setattr(HybridAttention, "_mask_over_slots", staticmethod(careless))


def slots_of_padding_stay_visible(monkeypatch):
    append = DecoderState.append_slots
    monkeypatch.setattr(DecoderState, "append_slots", lambda self, valid: append(self, torch.ones_like(valid)))


def a_step_forgets_the_past(monkeypatch):
    step = mixer.state_update
    monkeypatch.setattr(mixer, "state_update", lambda state, *args, **kwargs: step(torch.zeros_like(state), *args, **kwargs))


def a_window_is_lost_between_calls(monkeypatch):
    convolve = mixer.causal_convolution
    monkeypatch.setattr(
        mixer, "causal_convolution", lambda x, weight, bias, layout, state=None, **how: convolve(x, weight, bias, layout, **how)
    )


def keys_of_earlier_calls_are_hidden(monkeypatch):
    masked = HybridAttention._mask_over_slots
    monkeypatch.setattr(
        HybridAttention, "_mask_over_slots", staticmethod(lambda slots, layout, query: masked(torch.zeros_like(slots), layout, query))
    )


PACKED = {f"packed = separate, logits, by {way}" for way in ("cu_seq_lens", "seq_idx", "position_ids")}
STRAY = {"a sample's loss has no gradient at neighbours"}
GRADIENTS = STRAY | {f"packed = separate, gradients at {where}" for where in ("the inputs", "parameters")}
NEIGHBOURS = {"a changed sample moves no neighbour"}
KEPT = {f"a state kept after {side} padding goes on" for side in ("left", "right")}
CACHED = {"cached = uncached, in halves", "cached = uncached, token by token at the end"}


@pytest.mark.parametrize(
    ("fault", "check", "expected"),
    [
        (states_run_on, separation.packing, PACKED),
        (states_run_on, separation.gradients, GRADIENTS),
        (states_run_on, separation.neighbours, NEIGHBOURS),
        (windows_reach_over_borders, separation.packing, PACKED),
        (windows_reach_over_borders, separation.neighbours, NEIGHBOURS),
        (attention_sees_the_whole_row, separation.packing, PACKED),
        (attention_sees_the_whole_row, separation.gradients, GRADIENTS),
        (padding_has_a_time_step, separation.padding, KEPT | {"left padding and batch mates change nothing"}),
        (attention_sees_padding, separation.padding, {"left padding and batch mates change nothing"}),
        (slots_of_padding_stay_visible, separation.padding, KEPT),
        (a_step_forgets_the_past, answers.continued, {"cached = uncached, token by token at the end"}),
        (a_window_is_lost_between_calls, answers.continued, CACHED),
        (keys_of_earlier_calls_are_hidden, answers.continued, CACHED),
    ],
)
def test_a_planted_fault_fails_its_check(patient, monkeypatch, fault, check, expected):
    """And the same check holds without it, in test_doctor."""
    model, _, samples = patient
    fault(monkeypatch)
    assert failed(check(model, samples)) == expected


def test_tiles_of_a_neighbour_are_noticed(patient, monkeypatch):
    """Visual tokens written one tile further: shapes fit, nothing raises, every picture is the neighbour's."""
    model, _, samples = patient
    encode = model.encode_tiles
    monkeypatch.setattr(model, "encode_tiles", lambda pixels: encode(pixels).roll(1, 0))
    assert PACKED <= failed(separation.packing(model, samples))


def test_a_model_that_ignores_pictures_is_noticed(patient, monkeypatch):
    model, _, samples = patient
    encode = model.encode_tiles
    monkeypatch.setattr(model, "encode_tiles", lambda pixels: 0.0 * encode(pixels))
    assert failed(separation.neighbours(model, samples)) == {"the order of tiles matters"}


def test_random_packs_with_pictures_equal_their_parts(exact_model, tiny_processor):
    """Tile tags, several pictures and packing together: twelve random packs in float64."""
    generator = random.Random(0)
    for trial in range(12):
        samples = []
        for number in range(generator.randint(1, 5)):
            pictures = [noise(generator.randint(20, 300), generator.randint(20, 300), 100 * trial + 10 * number + i)
                        for i in range(generator.choice((0, 0, 1, 2, 3)))]  # fmt: skip
            content = [{"type": "image", "image": picture} for picture in pictures]
            content.insert(generator.randint(0, len(content)), {"type": "text", "text": "What? " * generator.randint(0, 9)})
            prepared = tiny_processor.prepare([{"role": "user", "content": content}, {"role": "assistant", "content": "red"}])
            ids, labels = (torch.tensor(row)[None] for row in (prepared.rendered.input_ids, prepared.rendered.labels))
            samples.append(Sample(ids, labels, tiny_processor.image_processor.normalize_pixels(prepared.pixels), {}))
        with torch.no_grad():
            packed = exact_model(**pack(samples)).logits[0]
            for place, sample in zip(places(samples), samples, strict=True):
                assert worst_position(packed[place], exact_model(**sample.model_inputs).logits[0]) < 1e-5, f"pack {trial}"
