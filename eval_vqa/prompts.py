"""What the model is asked, word for word.

A changed space in a prompt has moved a VizWiz score by nine points, so the templates are pinned by a snapshot test and the SHA-256 of
the template used stands with every score. These are the short-answer prompts that published scores of this family were measured with.
"""

from hashlib import sha256

__all__ = ["PROMPTS", "prompt_sha256", "render_prompt"]

SHORT_ANSWER = "Answer the question using a single word or phrase."
PROMPTS = {
    "vqav2": "{question}\n" + SHORT_ANSWER,
    "gqa": "{question}\n" + SHORT_ANSWER,
    "vizwiz": "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT_ANSWER,
    "textvqa": "{question}\n" + SHORT_ANSWER,
    "docvqa": "{question}\n" + SHORT_ANSWER,
    "chartqa": "{question}\n" + SHORT_ANSWER,
    "exact_match": "{question}\n" + SHORT_ANSWER,
}


def render_prompt(template: str, question: str) -> str:
    """`template` with `question` put in as it is, braces and all."""
    return template.replace("{question}", question)


def prompt_sha256(template: str) -> str:
    """SHA-256 (hex) of the template's UTF-8."""
    return sha256(template.encode("utf-8")).hexdigest()
