"""What the engine does to touch memory less is in force, and does not show in the answers."""

import pytest
import torch
from PIL import Image

from vlm.decoder import packed_weights
from vlm.decoder.slots import Slots
from vlm.engine import Engine, Request


def questions(count):
    picture = {"type": "image", "image": Image.effect_noise((200, 64), 90).convert("RGB")}
    asked = [{"type": "text", "text": f"question {number}"} for number in range(count)]
    return [Request([{"role": "user", "content": [picture, text]}], max_new_tokens=6) for text in asked]


@pytest.mark.skipif(packed_weights._operators() is None, reason="this torch has no oneDNN operators for linear layers")
def test_encoder_projector_and_decoder_multiply_with_packed_weights(tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(packed_weights, "LEAST_PRODUCTS", 1)  # the model is too small for it to pay
    assert tiny_model.get_output_embeddings().weight.dtype == torch.float32
    requests = questions(3)
    plain = Engine(tiny_model, tiny_processor, packed_bytes=0).generate(requests)
    engine = Engine(tiny_model, tiny_processor, packed_bytes=2**28, self_check=False)
    assert [answer.text for answer in engine.generate(requests)] == [answer.text for answer in plain]
    held = {id(weight.weight) for weight in engine._packed.weights.values() if weight.packed is not None}
    for part in (tiny_model.vision_encoder, tiny_model.projector, tiny_model.language_model):
        linears = [module for module in part.modules() if type(module) is torch.nn.Linear]
        assert any(id(module.weight) in held for module in linears)
    assert engine._packed.free_bytes < 2**28
    engine.forget()
    assert engine._packed.free_bytes == 2**28


def test_a_negative_amount_of_packed_memory_is_refused(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="packed_bytes = -1; expected 0 or more"):
        Engine(tiny_model, tiny_processor, packed_bytes=-1)


def test_questions_about_one_picture_read_its_state_where_it_stands(exact_model, tiny_processor, monkeypatch):
    copied, fork = [], Slots.fork
    monkeypatch.setattr(Slots, "fork", lambda *a, with_ssm=True: copied.append((len(a[3]), with_ssm)) or fork(*a, with_ssm=with_ssm))
    requests = questions(5)
    together = Engine(exact_model, tiny_processor, self_check=False).generate(requests)
    assert (5, False) in copied
    alone = [Engine(exact_model, tiny_processor, self_check=False).generate([request])[0] for request in requests]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
