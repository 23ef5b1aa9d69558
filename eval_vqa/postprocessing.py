"""What is done to generated text before it becomes an answer; the official scorers do the rest.

VQAv2: where all ten people agree the 2021 scorer compares letter by letter, so "Yes." would be wrong; lower case without a final period is
what its answers look like. More (articles, number words, hyphens) would break answers such as a unanimous "t-shirt". GQA compares letter
by letter always; its usual conversion is the same. VizWiz normalises every prediction itself. The description of the rule is stored with
each score. The text as generated stays in predictions.jsonl.
"""

__all__ = ["POSTPROCESSING", "lower_without_final_period", "strip"]


def lower_without_final_period(text: str) -> str:
    """Stripped, without final periods, in lower case."""
    return text.strip().rstrip(".").rstrip().lower()


def strip(text: str) -> str:
    """Without white space at both ends."""
    return text.strip()


POSTPROCESSING = {  # task -> (function, what it does in words)
    "vqav2": (lower_without_final_period, "strip; drop final periods; lower-case"),
    "gqa": (lower_without_final_period, "strip; drop final periods; lower-case"),
    "vizwiz": (strip, "strip"),
}
