"""How a model's conversations are marked: a value that travels with the processor, and the formats known by name.

The renderer writes tokens by it; the same format as a Jinja template serves tools that render text themselves.
"""

import json
import re
from dataclasses import asdict, dataclass

from .thinking import THINK_CLOSE

__all__ = ["PLACEHOLDER", "ROLES", "ChatFormat", "chat_formats"]

PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """How turns are marked. It is saved with the processor.

    bos: token before everything ("" for none); turn_open, turn_close: tokens around a turn; system: the system text used when the
    conversation brings none (None: no system turn). openings, closings: {role: text before / after its turn}, for a checkpoint whose turns
    are not `turn_open role line break ... turn_close line break`; what stands in `<...>` there is a token, `turn_close` the one that ends
    an answer.

    Reasoning checkpoints (vlm/chat_templates.py reads these off their templates): think_open ends the prompt when the model is to think
    first, think_skip when it is not ("" for a checkpoint without that switch); thinks: what the checkpoint does when nobody says.
    """

    bos: str = ""
    turn_open: str = "<|im_start|>"
    turn_close: str = "<|im_end|>"
    system: str | None = None
    openings: dict[str, str] | None = None
    closings: dict[str, str] | None = None
    think_open: str = ""
    think_skip: str = ""
    thinks: bool = False

    def opening(self, role: str) -> str:
        """The text before a turn of this role."""
        return self.openings[role] if self.openings else f"{self.turn_open}{role}\n"

    def closing(self, role: str) -> str:
        """The text after a turn of this role."""
        return self.closings[role] if self.closings else f"{self.turn_close}\n"

    def answer_opening(self, thinking: bool | None = None) -> str:
        """The text after an assistant's opening and before its answer; thinking None is the checkpoint's own habit.

        Raises ValueError when thinking is asked of a checkpoint without the switch.
        """
        if thinking and not self.think_open:
            raise ValueError("thinking is asked for, but this checkpoint's chat format has no thinking switch; leave it out")
        return self.think_open if self.starts_thinking(thinking) else self.think_skip

    def starts_thinking(self, thinking: bool | None = None) -> bool:
        """Whether the answer begins inside the thoughts (`opened` of vlm.thinking)."""
        return bool(self.think_open) and (self.thinks if thinking is None else thinking)

    def marks(self) -> list[str]:
        """The tokens that the tokenizer must have."""
        written = "".join([self.bos, *(self.openings or {}).values(), *(self.closings or {}).values()])
        found = re.findall(r"<[^<>\s]+>", written) if self.openings else [self.bos, self.turn_open]
        return list(dict.fromkeys(mark for mark in [*found, self.turn_close] if mark))

    def chat_template(self) -> str:
        """The same format as a Jinja template, for tools that render text themselves; `enable_thinking` is its thinking switch."""
        default = ""
        if self.system is not None:
            turn = f"{self.opening('system')}{self.system}{self.closing('system')}"
            default = "{% if messages[0]['role'] != 'system' %}" + turn + "{% endif %}"
        if self.openings or self.closings:
            roles = {role: [self.opening(role), self.closing(role)] for role in ROLES}
            opening, closing = "{{ turns[message['role']][0] }}", "{{ turns[message['role']][1] }}"
            default = "{% set turns = " + json.dumps(roles) + " %}" + default
        else:
            opening, closing = self.turn_open + "{{ message['role'] + '\n' }}", self.turn_close + "{{ '\n' }}"
        skipped, asked, words = "", "", "message['content']"
        if self.think_open:
            switch = f"enable_thinking | default({str(self.thinks).lower()})"
            opened, skip = json.dumps(self.think_open), json.dumps(self.think_skip)
            skipped = "{% if message['role'] == 'assistant' %}{{ " + skip + " }}{% endif %}"
            thought = f"'{THINK_CLOSE}' in message['content'] and message['role'] == 'assistant' and not loop.last"
            words = f"message['content'].split('{THINK_CLOSE}')[-1] | trim if {thought} else message['content']"
            asked = "{{ " + opened + " if " + switch + " else " + skip + " }}"
        assistant = json.dumps(self.opening("assistant")) if self.openings else None
        return (
            self.bos + default + "{% for message in messages %}" + opening + skipped + "{% if message['content'] is string %}"
            "{{ " + words + " }}{% else %}{% for part in message['content'] %}"
            "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
            + PLACEHOLDER
            + "{{ '\n' }}{% endif %}{% endfor %}{% endif %}"
            + closing
            + "{% endfor %}{% if add_generation_prompt %}"
            + (self.turn_open + "{{ 'assistant\n' }}" if assistant is None else "{{ " + assistant + " }}")
            + asked
            + "{% endif %}"
        )

    def to_dict(self) -> dict:
        return asdict(self)


def chat_formats() -> dict[str, ChatFormat]:
    """Named formats: "small" (a turn opens with one token of its role, no system turn), "chatml" (NVLM's SFT template), "nemotron"
    (NVIDIA's for Nemotron-H)."""
    follow = "Follow the user's instruction and answer questions."
    return {
        # Four tokens of marks around a short question and its answer, where ChatML has ten: the small model reads mostly questions.
        "small": ChatFormat(openings={role: f"<|{role}|>" for role in ROLES}, closings=dict.fromkeys(ROLES, "<|im_end|>")),
        "chatml": ChatFormat(system=follow),
        "nemotron": ChatFormat(bos="<s>", turn_open="<SPECIAL_14>", turn_close="<SPECIAL_15>", system=follow),
    }
