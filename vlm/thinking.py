"""Thoughts of a reasoning model: where they end, and the answer without them.

A score, a page or a next turn wants the answer only, and every one of them must cut at the same place: here. Whether a model thinks is
decided elsewhere (the `thinking` argument of the renderer); this file only reads what came out.
"""

__all__ = ["THINKING_MARKS", "THINK_CLOSE", "THINK_OPEN", "decode_answer", "split_thinking", "strip_thinking"]

THINK_OPEN, THINK_CLOSE = THINKING_MARKS = ("<think>", "</think>")


def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str]:
    """What a model said -> (thoughts, answer), both without the marks and without the white space around them.

    opened: the prompt already ended in `<think>`, so the text starts inside the thoughts. Thoughts that never end have no answer. A text
    without thoughts is returned as it is, white space too.
    """
    thoughts, closed, answer = text.rpartition(THINK_CLOSE)
    if closed:
        before, _, inside = thoughts.partition(THINK_OPEN) if THINK_OPEN in thoughts else ("", "", thoughts)
        return (before.strip() + inside.replace(THINK_CLOSE, "").replace(THINK_OPEN, "")).strip(), answer.strip()
    before, begun, inside = text.partition(THINK_OPEN)
    if begun:
        return inside.strip(), "" if opened else before.strip()
    return (text.strip(), "") if opened else ("", text)


def strip_thinking(text: str, *, opened: bool = False) -> str:
    """The answer of `split_thinking`: what is scored, shown and put into the next turn."""
    return split_thinking(text, opened=opened)[1]


def decode_answer(tokenizer, ids: list[int]) -> str:
    """Ids a model said -> text without special tokens, but with `<think>` and `</think>` where they are special tokens themselves.

    `decode(..., skip_special_tokens=True)` drops those too, and thoughts and answer would run together.
    """
    marks = {tokenizer.convert_tokens_to_ids(mark): mark for mark in THINKING_MARKS if mark in tokenizer.get_added_vocab()}
    pieces, run = [], []
    for index in ids:
        if index in marks:
            pieces += [tokenizer.decode(run, skip_special_tokens=True), marks[index]]
            run = []
        else:
            run.append(index)
    return "".join([*pieces, tokenizer.decode(run, skip_special_tokens=True)])
