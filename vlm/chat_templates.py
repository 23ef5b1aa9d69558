"""Read a reasoning checkpoint's chat format off its own template.

A reasoning checkpoint was trained on its own marks and on a thinking switch; eyes must not change either. Its Jinja template is asked to
write a few known turns, and the text between them is the format (`ChatFormat`), which our renderer then writes itself: user text stays
plain text, and images have their place. Checkpoints without a switch keep the formats of rendering.py.

Given up: tools, and switches inside the conversation (`/no_think` in a text stays text; the switch is the `thinking` argument).
"""

import re

from .chat_format import ROLES, ChatFormat
from .thinking import THINK_CLOSE, THINK_OPEN

__all__ = ["reasoning_chat_format"]

WORDS = {"system": "Systemwords", "user": "Userwords", "assistant": "Answerwords"}  # texts no template writes by itself
OFF_SWITCHES = ("/no_think", "detailed thinking off")


def _write(tokenizer, roles: tuple[str, ...], *, answer_next: bool = True, thinking: bool = True, switch: str = "") -> str:
    """The checkpoint's own text of turns of these roles; `switch` is added to the system turn."""
    messages = [{"role": role, "content": WORDS[role] + (" " + switch if switch and role == "system" else "")} for role in roles]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next, enable_thinking=thinking)


def _without_thoughts(text: str) -> str:
    return re.sub(f"{THINK_OPEN}\\s*{THINK_CLOSE}", "", text)


def reasoning_chat_format(tokenizer) -> ChatFormat | None:
    """The chat format of a tokenizer whose template has a thinking switch; None when it has no template or no such switch.

    Raises ValueError when the template has the switch but its turns cannot be told apart, with what it wrote.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = _write(tokenizer, ("system", "user"))
    _, found, tail = asked.partition(WORDS["user"])
    if not found or THINK_OPEN not in tail:
        return None

    # 1. What stands between two turns is the closing of the first and, from its last token mark on, the opening of the second.
    marks = [mark for mark in tokenizer.get_added_vocab() if mark not in (THINK_OPEN, THINK_CLOSE)]

    def cut(joint: str) -> tuple[str, str]:
        joint = joint.partition(THINK_OPEN)[0]
        place = max((joint.rfind(mark) for mark in marks), default=-1)
        if place < 0:
            raise ValueError(f"the chat template writes {joint!r} between two turns; expected a token of the tokenizer there")
        return joint[:place], joint[place:]

    conversation = _write(tokenizer, ("system", "user", "assistant", "user"), answer_next=False)
    pieces = re.split("|".join(WORDS.values()), conversation)
    if len(pieces) != 5:
        raise ValueError(f"the chat template leaves out turns: {conversation!r}; expected a system, a user, an assistant and a user turn")
    openings, closings = {}, {}
    bos, openings["system"] = cut(pieces[0])
    closings["system"], openings["user"] = cut(pieces[1])
    closings["user"], openings["assistant"] = cut(pieces[2])
    closings["assistant"], _ = cut(pieces[3])
    ends = [mark for mark in marks if mark in closings["assistant"]]
    if not ends:
        raise ValueError(f"the chat template ends an answer with {closings['assistant']!r}; expected an end-of-turn token of the tokenizer")

    # 2. The switch: an argument of the template, or words in the system turn.
    think_open = tail.partition(openings["assistant"])[2]
    quiet = [_write(tokenizer, ("system", "user"), thinking=False)]
    quiet += [_write(tokenizer, ("system", "user"), switch=words) for words in OFF_SWITCHES]
    skips = [text.partition(WORDS["user"])[2].partition(openings["assistant"])[2] for text in quiet]
    think_skip = next((text for text in skips if text != think_open), "")

    # 3. The system turn written when the conversation has none.
    bare = _write(tokenizer, ("user",)).partition(WORDS["user"])[0].removesuffix(openings["user"])
    start = bos + openings["system"]
    system = bare.removeprefix(start).removesuffix(closings["system"]) if bare.startswith(start) else None

    chat = ChatFormat(
        bos=bos, turn_open="", turn_close=min(ends, key=closings["assistant"].index), system=system, openings=openings, closings=closings,
        think_open=think_open, think_skip=think_skip, thinks=_habit(tokenizer) == asked,
    )  # fmt: skip
    _compare(tokenizer, chat)
    return chat


def _habit(tokenizer) -> str:
    """What the template writes when nobody says whether to think."""
    messages = [{"role": role, "content": WORDS[role]} for role in ("system", "user")]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _compare(tokenizer, chat: ChatFormat) -> None:
    """Raises ValueError where the format that was read writes other text than the template it was read from."""
    for roles in (("user",), ("system", "user"), ("system", "user", "assistant", "user")):
        system = [] if chat.system is None or roles[0] == "system" else [(chat.system, "system")]
        turns = [*system, *((WORDS[role], role) for role in roles)]
        ours = chat.bos + "".join(chat.opening(role) + text + chat.closing(role) for text, role in turns)
        ours += chat.opening("assistant") + chat.think_open
        theirs = _without_thoughts(_write(tokenizer, roles))
        if ours != theirs:
            raise ValueError(
                f"the chat template writes {theirs!r} where its format, read off from it, gives {ours!r}; give --preset a format"
            )
    assert set(chat.openings) == set(ROLES), "every role was read"
