"""What is done to generated text before it becomes an answer; the official scorers do the rest.

What a reasoning model thinks aloud is no answer and goes first. VQAv2: where all ten people agree the 2021 scorer compares letter by
letter, so "Yes." would be wrong; lower case without a final period is what its answers look like. More (articles, number words, hyphens)
would break answers such as a unanimous "t-shirt". GQA compares letter by letter always; its usual conversion is the same. VizWiz, TextVQA,
DocVQA and ChartQA normalise every prediction themselves. The description of the rule is stored with each score. The text as generated stays
in predictions.jsonl.
"""

__all__ = ["POSTPROCESSING", "lower_without_final_period", "strip", "without_final_period", "without_thinking"]

THINKING_MARK = "think>"


def without_thinking(text: str) -> str:
    """`text` without `<think>...</think>`."""
    if THINKING_MARK not in text:  # spares an import of torch where nothing is to be done
        return text
    from vlm.thinking import strip_thinking

    return strip_thinking(text)


def lower_without_final_period(text: str) -> str:
    """Stripped, without final periods, in lower case."""
    return text.strip().rstrip(".").rstrip().lower()


def without_final_period(text: str) -> str:
    """Stripped, without final periods."""
    return text.strip().rstrip(".").rstrip()


def strip(text: str) -> str:
    """Without white space at both ends."""
    return text.strip()


POSTPROCESSING = {  # task -> (function, what it does in words)
    "vqav2": (lower_without_final_period, "drop thinking; strip; drop final periods; lower-case"),
    "gqa": (lower_without_final_period, "drop thinking; strip; drop final periods; lower-case"),
    "vizwiz": (strip, "drop thinking; strip"),
    "textvqa": (strip, "drop thinking; strip"),
    "docvqa": (without_final_period, "drop thinking; strip; drop final periods"),
    "chartqa": (without_final_period, "drop thinking; strip; drop final periods"),
    "exact_match": (lower_without_final_period, "drop thinking; strip; drop final periods; lower-case"),
}
