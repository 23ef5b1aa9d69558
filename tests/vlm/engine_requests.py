"""Requests that several tests of the engine ask, about two pictures of noise: a wide one and a square one."""

from PIL import Image

from vlm.engine import Request

PICTURES = [Image.effect_noise((200, 64), 90).convert("RGB"), Image.effect_noise((64, 64), 90).convert("RGB")]


def ask(words, *pictures, **settings):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return Request([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}], **({"max_new_tokens": 8} | settings))
