"""The answer normaliser that VQAv2 and VizWiz share, quirks included.

The official steps are three: clean, strip punctuation, digits and articles. Several of their effects look like mistakes (one "1,000"
anywhere deletes every other mark; at most 32 periods go; what stands before a period does not matter), but published scores were
measured with them, so they stay. Digits are ASCII digits, as in the official Python 2 program; lower-casing is today's Python.
"""

import re

__all__ = ["clean", "digits_and_articles", "normalize", "strip_punctuation"]

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # 21 marks; apostrophe, colon and period are not among them
DIGIT_COMMA_DIGIT = re.compile("[0-9],[0-9]")
PERIOD = re.compile(r"\.(?![0-9])")
MOST_PERIODS = 32  # the official call passes re.UNICODE (32) where `count` belongs
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset(("a", "an", "the"))


def clean(text: str) -> str:
    """`text` with line feeds and tabs as spaces, stripped at both ends. Raises ValueError when it is not a string."""
    if not isinstance(text, str):
        raise ValueError(f"an answer must be a string, found {text!r} ({type(text).__name__})")
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """`text` without the marks of PUNCTUATION and without most periods.

    Each kind of mark is deleted everywhere if it touches a space anywhere, or if a digit-comma-digit stands anywhere; else it becomes a
    space. Both tests look at the text as it came in. Then the first 32 periods that no digit follows are deleted.
    """
    has_thousands = DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark in text:
            touches_space = f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if touches_space or has_thousands else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def digits_and_articles(text: str, contractions: dict[str, str]) -> str:
    """`text` in lower case, number words up to ten as digits, articles dropped, `contractions` repaired, single spaces."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def normalize(text: str, contractions: dict[str, str]) -> str:
    """All three steps in order. Raises ValueError when `text` is not a string."""
    return digits_and_articles(strip_punctuation(clean(text)), contractions)
