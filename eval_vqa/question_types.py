"""The 65 question types of VQAv2: the longest of them that a question begins with.

The VQAv2 metric reads the type from the annotation. Computing it from the text serves the baselines on GQA and VizWiz, whose files
have none.
"""

import re

__all__ = ["QUESTION_TYPES", "question_type"]

OTHER = "none of the above"
QUESTION_TYPES = (
    "how many", "is the", "what", "what color is the", "what is the", "is this", "is this a", "what is", "are the", "what kind of",
    "is there a", "what type of", "is it", "what are the", "where is the", "is there", "does the", "what color are the", "are these",
    "are there", "which", "is", "what is the man", "is the man", "are", "how", "does this", "what is on the", "what does the",
    "how many people are", "what is in the", "what is this", "do", "what are", "are they", "what time", "what sport is", "are there any",
    "is he", "what color is", "why", "where are the", "what color", "who is", "what animal is", "is the woman", "is this an", "do you",
    "how many people are in", "what room is", "has", "is this person", "what is the woman", "can you", "why is the", "is the person",
    "what is the color of the", "what is the person", "could", "was", "is that a", "what number is", "what is the name", "what brand",
    "none of the above",
)  # fmt: skip
_BY_WORDS = {tuple(name.split()): name for name in QUESTION_TYPES if name != OTHER}
_MOST_WORDS = max(map(len, _BY_WORDS))


def question_type(question: str) -> str:
    """The longest official type whose words the question begins with, upper case and punctuation aside; else "none of the above"."""
    words = tuple(re.findall(r"[a-z0-9']+", question.lower())[:_MOST_WORDS])
    for count in range(len(words), 0, -1):
        if words[:count] in _BY_WORDS:
            return _BY_WORDS[words[:count]]
    return OTHER
