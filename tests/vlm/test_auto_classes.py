"""The model as a user of transformers meets it: Auto classes, chat template with images, generate, streamer, pipeline, Trainer, peft."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from vlm import VisionLanguageModel, VLMConfig, VLMImageProcessor, VLMProcessor
from vlm.checkpoint import save_model
from vlm.engine import Engine, Request


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(exact_model, tiny_processor, tmp_path_factory):
    return save_model(exact_model, tiny_processor, tmp_path_factory.mktemp("auto") / "model")


@pytest.fixture(scope="module")
def opened(folder):
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three on disk, as users have them."""
    paths = []
    for number, size in enumerate([(200, 64), (64, 64), (64, 130)]):
        paths.append(str(tmp_path_factory.mktemp("pictures") / f"{number}.png"))
        noise(*size, number).save(paths[-1])
    return paths


def ask(words, *pictures):
    return [{"role": "user", "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": words}]}]


def encode(processor, conversations):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )  # fmt: skip


def answers(model, processor, conversations, **settings):
    inputs = encode(processor, conversations)
    out = model.generate(**inputs, **({"max_new_tokens": 8, "do_sample": False} | settings))
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_auto_class_opens_a_saved_folder(folder, opened, exact_model):
    model, processor = opened
    assert isinstance(model, VisionLanguageModel) and isinstance(processor, VLMProcessor)
    assert isinstance(AutoConfig.from_pretrained(folder), VLMConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(folder), VLMImageProcessor)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()
    assert model.dtype == torch.float64
    assert all(torch.equal(value, exact_model.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_batch_of_conversations_with_pictures_is_answered_as_one_by_one_and_by_the_engine(opened, pictures):
    """Paths, several pictures, none: the call that harnesses make."""
    model, processor = opened
    conversations = [ask("What?", pictures[0]), ask("No picture."), ask("Which is larger?", *pictures[1:])]
    batched = answers(model, processor, conversations)
    assert batched == [answers(model, processor, [conversation])[0] for conversation in conversations]
    assert batched == [a.text for a in Engine(model, processor).generate([Request(c, max_new_tokens=8) for c in conversations])]
    assert len(set(batched)) > 1


def test_one_conversation_need_not_be_a_list_of_conversations(opened, pictures):
    model, processor = opened
    alone = processor.apply_chat_template(ask("What?", pictures[0]), tokenize=True, return_dict=True, add_generation_prompt=True)
    assert torch.equal(alone["input_ids"], encode(processor, [ask("What?", pictures[0])])["input_ids"])
    opened_picture = encode(processor, [ask("What?", Image.open(pictures[0]))])
    assert torch.equal(alone["pixel_values"], opened_picture["pixel_values"])


def test_sampling_follows_the_seed_and_its_settings(opened, pictures):
    model, processor = opened
    asked = [ask("What?", pictures[0]), ask("And?")]

    def draw(seed, **settings):
        set_seed(seed)
        return answers(model, processor, asked, do_sample=True, **settings)

    assert draw(1, temperature=1.5, top_p=0.95) == draw(1, temperature=1.5, top_p=0.95)
    assert len({tuple(draw(seed, temperature=1.5)) for seed in range(3)}) > 1
    assert draw(1, top_k=1) == answers(model, processor, asked)


def test_a_streamer_gets_the_answer_in_pieces(opened, pictures):
    model, processor = opened

    class Collected(TextStreamer):
        def __init__(self):
            super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.pieces = []

        def on_finalized_text(self, text, stream_end=False):
            self.pieces.append(text)

    streamer, asked = Collected(), [ask("Tell.", pictures[0])]
    expected = answers(model, processor, asked, min_new_tokens=8)
    answers(model, processor, asked, min_new_tokens=8, streamer=streamer)
    assert "".join(streamer.pieces).strip() == expected[0].strip() and len(streamer.pieces) > 1


def test_generate_stops_at_the_end_of_turn_of_each_row(opened, monkeypatch):
    """Without the end token in generation_config a row would talk on, as the user, to the last position allowed."""
    model, processor = opened
    end, pad = processor.renderer.end_of_turn_id, processor.tokenizer.pad_token_id
    head, asked = model.get_output_embeddings(), [ask("a"), ask("b c d")]
    inputs, steps, word = encode(processor, asked), [], 77

    def speak(hidden):
        steps.append(len(steps))
        logits = hidden.new_zeros(*hidden.shape[:-1], head.weight.shape[0])
        logits[..., word] = 1.0
        logits[0, :, end] = 2.0 if steps[-1] == 1 else 0.0  # the first row ends after a word, the second after three
        logits[1, :, end] = 2.0 if steps[-1] == 3 else 0.0
        return logits

    monkeypatch.setattr(head, "forward", speak)
    out = model.generate(**inputs, max_new_tokens=50, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert out.tolist() == [[word, end, pad, pad], [word, word, word, end]]


def test_the_pipeline_answers(opened, pictures):
    model, processor = opened
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (found,) = pipe(text=ask("What?", pictures[0]), max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found["generated_text"].strip() == answers(model, processor, [ask("What?", pictures[0])])[0].strip()


def test_transformers_own_save_and_load_keep_the_answer(opened, pictures, tmp_path):
    model, processor = opened
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    asked = [ask("What?", pictures[0]), ask("And?")]
    assert answers(*again, asked) == answers(model, processor, asked)


def test_another_dtype_can_be_asked_for(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert model.dtype == torch.bfloat16 and model(input_ids=torch.arange(40, 50)[None]).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # torch's data loader without an accelerator
def test_a_trainer_can_train_it(opened, pictures, tmp_path):
    """transformers divides by the supervised tokens of all accumulated batches when the model takes that number."""
    model, processor = copy.deepcopy(opened[0]).float(), opened[1]
    samples = [ask("What?", pictures[0]), ask("And?"), ask("No?", pictures[1]), ask("x")]

    def collate(conversations):
        turns = [[*conversation, {"role": "assistant", "content": "a red ball"}] for conversation in conversations]
        prepared = [processor.prepare(turn) for turn in turns]
        batch = processor.pad([sample.rendered.input_ids for sample in prepared])
        labels = torch.full_like(batch["input_ids"], -100)
        for row, sample in enumerate(prepared):
            labels[row, -len(sample.rendered.labels) :] = torch.tensor(sample.rendered.labels)
        pixels = processor.image_processor.normalize_pixels(torch.cat([sample.pixels for sample in prepared]))
        return {**batch, "labels": labels, "pixel_values": pixels}

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=4, learning_rate=3e-3, report_to=[], remove_unused_columns=False,
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by an old name
def test_peft_wraps_it_as_any_model(opened, pictures):
    peft = pytest.importorskip("peft")
    model, processor = copy.deepcopy(opened[0]), opened[1]
    asked = [ask("What?", pictures[0])]
    expected = answers(model, processor, asked)
    # Named alone, q_proj would be the vision encoder's too: vlm.lora keeps to the decoder by itself.
    decoder = r"language_model\..*\.(in_proj|out_proj|q_proj)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=decoder))
    assert answers(wrapped, processor, asked) == expected
    ids = torch.arange(40, 60)[None]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    silent = [name for name, p in wrapped.named_parameters() if ".lora_B." in name and (p.grad is None or not p.grad.any())]
    assert not silent and wrapped.get_nb_trainable_parameters()[0] > 0
