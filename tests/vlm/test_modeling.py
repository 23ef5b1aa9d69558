"""The whole model: packed = separate, padded = alone, cached = uncached, generate = engine, and where it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlm.modeling as modeling
from vlm.assemble import assemble
from vlm.decoder.state import DecoderState
from vlm.engine import Engine, Request
from vlm.loss import IGNORE_INDEX


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(processor, sizes, question, answer="a red ball", seed=0):
    """(ids (1, T), labels (1, T), pixel_values (N, 3, H, W) float64) of one conversation with images of these sizes."""
    parts = [{"type": "image", "image": noise(*size, seed + number)} for number, size in enumerate(sizes)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}, {"role": "assistant", "content": answer}]
    prepared = processor.prepare(messages)
    pixels = processor.image_processor.normalize_pixels(prepared.pixels).double()
    return torch.tensor(prepared.rendered.input_ids)[None], torch.tensor(prepared.rendered.labels)[None], pixels


@pytest.fixture(scope="module")
def samples(tiny_processor):
    """One image of three tiles; text only; two images; one tile."""
    return [
        sample(tiny_processor, [(128, 64)], "What colour is the ball?"),
        sample(tiny_processor, [], "No picture here."),
        sample(tiny_processor, [(64, 64), (64, 128)], "Which is larger?", "the second", seed=5),
        sample(tiny_processor, [(60, 60)], "And?", "x", seed=9),
    ]


def pack(samples):
    ids, labels, pixels = (torch.cat([entry[place] for entry in samples], dim=int(place < 2)) for place in range(3))
    lengths = torch.tensor([0, *(entry[0].shape[1] for entry in samples)])
    return ids, labels, pixels, lengths.cumsum(0)


def borders(samples):
    ends = np.cumsum([entry[0].shape[1] for entry in samples])
    return [slice(end - entry[0].shape[1], end) for end, entry in zip(ends, samples, strict=True)]


@torch.no_grad()
def logits_alone(model, entry):
    return model(input_ids=entry[0], pixel_values=entry[2]).logits[0]


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "seq_idx", "position_ids"])
def test_packed_logits_equal_separate_ones(exact_model, samples, how):
    """Several samples, several images each: tiles must land in their own sample, and no state may cross a border."""
    ids, _, pixels, ends = pack(samples)
    lengths = ends.diff()
    packing = {
        "cu_seq_lens_q": ends,
        "seq_idx": torch.arange(len(samples), dtype=torch.int32).repeat_interleave(lengths)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    with torch.no_grad():
        packed = exact_model(input_ids=ids, pixel_values=pixels, **{how: packing[how]}).logits[0]
    for place, entry in zip(borders(samples), samples, strict=True):
        torch.testing.assert_close(packed[place], logits_alone(exact_model, entry), rtol=1e-5, atol=1e-5)


def gradients(model, loss):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True) if gradient is not None}


def test_packed_gradients_equal_the_sum_of_separate_ones(exact_model, samples):
    """All parameters, encoder and projector too."""
    ids, labels, pixels, ends = pack(samples)
    packed = exact_model(input_ids=ids, pixel_values=pixels, labels=labels, cu_seq_lens_q=ends, num_items_in_batch=7)
    separate = [exact_model(input_ids=i, pixel_values=p if len(p) else None, labels=y, num_items_in_batch=7) for i, y, p in samples]
    torch.testing.assert_close(packed.loss, sum(output.loss for output in separate))
    expected = gradients(exact_model, sum(output.loss for output in separate))
    found = gradients(exact_model, packed.loss)
    assert found.keys() == expected.keys() and any(name.startswith("vision_encoder") for name in found)
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_changing_one_sample_never_moves_its_neighbours(exact_model, tiny_processor, samples):
    """To the bit, also when the changed sample brings another picture."""
    changed = list(samples)
    ids, labels, pixels = samples[2]
    changed[2] = (ids.roll(0).masked_fill(ids == ids[0, -3], 77), labels, -3.0 * pixels)
    with torch.no_grad():
        results = [exact_model(input_ids=p[0], pixel_values=p[2], cu_seq_lens_q=p[3]).logits[0] for p in (pack(samples), pack(changed))]
    for number, place in enumerate(borders(samples)):
        assert torch.equal(results[0][place], results[1][place]) == (number != 2)


def test_a_forgotten_border_is_seen(exact_model, samples, monkeypatch):
    """The comparison above can fail: with the border kept from the decoder it does."""
    ids, _, pixels, ends = pack(samples)
    with torch.no_grad():
        right = exact_model(input_ids=ids, pixel_values=pixels, cu_seq_lens_q=ends).logits[0]
        wrong = exact_model(input_ids=ids, pixel_values=pixels).logits[0]
    first = borders(samples)[0]
    assert torch.allclose(right[first], wrong[first]) and (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_change_no_logits(exact_model, samples, side):
    width = max(entry[0].shape[1] for entry in samples) + 3
    rows, masks = [], []
    for ids, _, _ in samples:
        filler, ones = torch.full((1, width - ids.shape[1]), 2), torch.ones_like(ids)
        rows.append(torch.cat([filler, ids] if side == "left" else [ids, filler], dim=1))
        masks.append(torch.cat([filler * 0, ones] if side == "left" else [ones, filler * 0], dim=1))
    mask = torch.cat(masks)
    pixels = torch.cat([entry[2] for entry in samples])
    for use_cache in (False, True):
        with torch.no_grad():
            logits = exact_model(input_ids=torch.cat(rows), pixel_values=pixels, attention_mask=mask, use_cache=use_cache).logits
        for row, entry in enumerate(samples):
            torch.testing.assert_close(logits[row, mask[row].bool()], logits_alone(exact_model, entry), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[60, 1, 1, 1], [10, 53]])
def test_cached_logits_equal_uncached_ones(exact_model, samples, pieces):
    ids, _, pixels = samples[0]
    pieces = [*pieces, ids.shape[1] - sum(pieces)]
    state, found = None, []
    embeddings = exact_model.embed(ids, pixels)
    with torch.no_grad():
        for part in embeddings.split(pieces, dim=1):
            output = exact_model(inputs_embeds=part, past_key_values=state, use_cache=True)
            state = output.past_key_values
            found.append(output.logits[0])
        assert isinstance(state, DecoderState) and state.seen_tokens == ids.shape[1]
        torch.testing.assert_close(torch.cat(found), logits_alone(exact_model, samples[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 7])])
def test_kept_logits_are_those_of_the_last_positions(exact_model, samples, keep):
    with torch.no_grad():
        found = exact_model(input_ids=samples[1][0], logits_to_keep=keep).logits[0]
    whole = logits_alone(exact_model, samples[1])
    torch.testing.assert_close(found, whole[keep] if isinstance(keep, torch.Tensor) else whole[-keep:])


def test_the_loss_is_the_mean_over_supervised_tokens_unless_told_otherwise(exact_model, samples):
    ids, labels, pixels = samples[0]
    output = exact_model(input_ids=ids, labels=labels, pixel_values=pixels)
    expected = torch.nn.functional.cross_entropy(logits_alone(exact_model, samples[0])[:-1], labels[0, 1:], ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(output.loss.float(), expected)
    assert output.logits is None and len(output.token_losses) == (labels >= 0).sum()


def test_blank_tiles_change_nothing_but_reach_every_parameter(exact_model, samples):
    """A rank without an image must run the same collectives; its numbers must not move."""
    ids, labels, _ = samples[1]
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    plain = exact_model(input_ids=ids, labels=labels)
    blanked = exact_model(input_ids=ids, labels=labels, pixel_values=blank, pixels_are_blank=True)
    assert torch.equal(plain.loss, blanked.loss)
    found = gradients(exact_model, blanked.loss)
    touched = {name for name, p in exact_model.named_parameters() if name.startswith("projector")}
    assert touched <= found.keys() and not any(found[name].any() for name in touched)


def test_blank_tiles_move_no_running_statistics(tiny_processor, samples):
    """BatchNorm in train mode: black tiles would pull every variance towards 0. Each is still encoded once, by statistics of its batch,
    with a gradient of 0 for every parameter; any other call moves the statistics as before."""
    model, _ = assemble("tiny", vision_encoder="timm:resnet10t", vision_settings={"image_size": 64, "output_stride": 8}, seed=0)
    model.train()
    encoder, (ids, labels, _), blank = model.vision_encoder, samples[1], torch.zeros(1, 3, 64, 64)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    calls = []
    handle = encoder.register_forward_hook(lambda module, inputs, output: calls.append(output.detach()))
    for _ in range(3):
        model(input_ids=ids, labels=labels, pixel_values=blank, pixels_are_blank=True).loss.backward()
    handle.remove()
    assert any(name.endswith("running_var") for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in encoder.parameters())
    assert len(calls) == 3 and all(torch.equal(call, encoder(blank)) for call in calls)
    moved = {name for name, buffer in encoder.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved >= {name for name in before if name.endswith(("running_var", "num_batches_tracked"))}


def test_placeholders_and_visual_tokens_must_agree(exact_model, samples):
    """Both numbers stand in the error; written on regardless, pictures would move into each other's places."""
    ids, _, pixels = samples[0]
    with pytest.raises(ValueError, match="found 48 image placeholders in input_ids for 32 visual tokens"):
        exact_model(input_ids=ids, pixel_values=pixels[:2])
    with pytest.raises(ValueError, match="found 48 image placeholders in input_ids for 0 visual tokens"):
        exact_model(input_ids=ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 4])}, "expected one row of packed samples"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 3])}, "the layout describes"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1, 1]])}, "padding inside a row"),
    ],
)
def test_wrong_calls_are_refused(exact_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        exact_model(**arguments)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_changes_no_gradient(exact_model, samples, name, monkeypatch):
    """By transformers' newer and older name, called as its Trainer does."""
    ids, labels, pixels = samples[0]
    expected = gradients(exact_model, exact_model(input_ids=ids, labels=labels, pixel_values=pixels).loss)
    runs = []
    for block in exact_model.language_model.model.layers:
        monkeypatch.setattr(
            block.mixer, "forward", lambda *rest, _forward=block.mixer.forward, **more: runs.append(1) or _forward(*rest, **more)
        )
    getattr(exact_model, f"{name}_enable")(**{f"{name}_kwargs": None, "every_n_layers": 1, "offload": False})
    exact_model.training = True
    try:
        found = gradients(exact_model, exact_model(input_ids=ids, labels=labels, pixel_values=pixels).loss)
    finally:
        getattr(exact_model, f"{name}_disable")()
        exact_model.eval()
    assert len(runs) == 2 * len(exact_model.language_model.model.layers) and not exact_model.gradient_checkpointing
    for parameter in expected:
        torch.testing.assert_close(found[parameter], expected[parameter])


@pytest.mark.parametrize("wish", [{"every_n_layers": 2}, {"offload": True}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}])
def test_ways_of_checkpointing_that_there_are_not_are_refused(tiny_model, wish):
    with pytest.raises(ValueError, match="expected use_reentrant=False of every layer, without offload"):
        tiny_model.activation_checkpointing_enable(**wish)
    assert not tiny_model.gradient_checkpointing


QUESTIONS = [
    [{"type": "image", "image": noise(200, 64, 1)}, {"type": "text", "text": "What is it?"}],
    [{"type": "text", "text": "No picture."}],
    [{"type": "image", "image": noise(64, 64, 2)}, {"type": "image", "image": noise(64, 128, 3)}, {"type": "text", "text": "Which?"}],
]


def generated(model, processor, contents, **settings):
    """Texts and ids of transformers' generate for user turns."""
    templates = [processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) for content in contents]
    images = [[part["image"] for part in content if part["type"] == "image"] for content in contents]
    batch = processor(text=templates, images=images)
    out = model.generate(**batch, max_new_tokens=10, **settings)
    if settings.get("return_dict_in_generate"):
        return out
    out = out[:, batch["input_ids"].shape[1] :]
    return out, [processor.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def test_generate_equals_the_engine_batched_and_single(exact_model, tiny_processor):
    """Three ways to the same greedy answer: transformers' loop with left padding, one at a time, and our engine."""
    _, batched = generated(exact_model, tiny_processor, QUESTIONS, do_sample=False)
    single = [generated(exact_model, tiny_processor, [content], do_sample=False)[1][0] for content in QUESTIONS]
    requests = [Request([{"role": "user", "content": content}], max_new_tokens=10) for content in QUESTIONS]
    answers = [answer.text for answer in Engine(exact_model, tiny_processor).generate(requests)]
    assert batched == single == answers
    assert len(set(answers)) > 1


def score(model, processor, content, tokens):
    """Log-probability of a continuation, by one plain forward pass."""
    prepared = processor.prepare([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = torch.tensor(prepared.rendered.input_ids + tokens)[None]
    pixels = processor.image_processor.normalize_pixels(prepared.pixels)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(prepared.rendered.input_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()


def test_beams_carry_each_rows_own_tiles_and_states(exact_model, tiny_processor):
    """transformers repeats tensors row by row: tiles of an image would be dealt out among the beams, and nothing would fail.

    The scores that beam search reports are compared with a plain forward pass over what it chose.
    """
    beams = {"do_sample": False, "num_beams": 3, "num_return_sequences": 3, "min_new_tokens": 10, "length_penalty": 0.0}
    contents = [QUESTIONS[0], QUESTIONS[2]]
    out = generated(exact_model, tiny_processor, contents, **beams, return_dict_in_generate=True, output_scores=True)
    for row in range(6):
        tokens = out.sequences[row, -10:].tolist()
        assert out.sequences_scores[row].item() == pytest.approx(score(exact_model, tiny_processor, contents[row // 3], tokens), abs=1e-3)
    alone = generated(exact_model, tiny_processor, contents[1:], **beams, return_dict_in_generate=True)
    assert out.sequences[3:, -10:].tolist() == alone.sequences[:, -10:].tolist()


def test_several_returned_sequences_get_the_right_tiles(exact_model, tiny_processor):
    """The same trap without beams: sampling at a temperature near 0 is greedy, three times."""
    greedy, _ = generated(exact_model, tiny_processor, [QUESTIONS[2]], do_sample=False)
    drawn, _ = generated(exact_model, tiny_processor, [QUESTIONS[2]], do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert drawn.tolist() == greedy.tolist() * 3


def test_generate_never_says_a_placeholder(tiny, monkeypatch):
    """A placeholder in an answer has no tile, and the next step would refuse it."""
    model, processor = tiny
    head = model.get_output_embeddings()
    token = model.config.image_token_id
    monkeypatch.setattr(
        head, "forward", lambda hidden: torch.nn.functional.linear(hidden, head.weight).index_fill(-1, torch.tensor([token]), 99.0)
    )
    out, _ = generated(model, processor, QUESTIONS[:1], do_sample=False)
    assert token not in out.tolist()[0]


def test_parameter_counts_cover_the_model(tiny_model):
    assert sum(tiny_model.parameter_counts().values()) == sum(p.numel() for p in tiny_model.parameters())


def test_a_model_without_encoder_settings_says_what_to_do():
    from vlm.configuration import VLMConfig

    with pytest.raises(ValueError, match="make a model by python -m vlm.assemble"):
        modeling.VisionLanguageModel(VLMConfig())
