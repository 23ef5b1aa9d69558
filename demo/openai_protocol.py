"""OpenAI's chat completions as plain values: what a request asks for, and the replies, chunks and errors in their shape.

No web framework and no engine at work here, so that each rule is a line a test can reach. What this server cannot do (tools, JSON
mode, ...) is refused by name, and so is a setting nobody knows: an answer that ignores what was asked for looks right and is not.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.engine import Answer, Request, TokenLogprobs
from vlm.engine.request import MOST_LOGPROBS

from .sent_pictures import open_sent_picture

__all__ = ["Asked", "Limits", "ProtocolError", "chunk", "completion", "model_entry", "read_request", "unknown_model", "usage"]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
MOST_STOPS = 4
READ = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options",
        "logprobs", "top_logprobs", "chat_template_kwargs")  # fmt: skip
# Accepted and without effect on an answer.
IDLE = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
# Of what is not supported, the values that ask for nothing; clients send them as a matter of form.
NEUTRAL = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": (), "verbosity": (),
}  # fmt: skip


class ProtocolError(Exception):
    """An error as a client of OpenAI's reads it: HTTP status, message, the parameter at fault, and a code where one is usual."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None):
        super().__init__(message)
        self.status = status
        message, param = (text and text.encode("utf-8", "backslashreplace").decode() for text in (message, param))  # half a surrogate pair
        kind = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown_model(asked, name: str) -> ProtocolError:
    """The error of a request to another model than `name`."""
    return ProtocolError(404, f"the model {asked!r} is not here; this server has {name!r}", param="model", code="model_not_found")


@dataclass(frozen=True)
class Limits:
    """most_new_tokens: of one answer, and its length where a request does not say; most_choices: `n` of one request."""

    most_new_tokens: int = 1024
    most_choices: int = 16


@dataclass(frozen=True)
class Asked:
    """A request as the engine takes it, one for each of the `n` answers wanted, and the form of the reply."""

    requests: tuple[Request, ...]
    stream: bool = False
    include_usage: bool = False


def read_request(content: bytes, name: str, limits: Limits) -> Asked:
    """The JSON of a request to the model called `name`. Raises ProtocolError with status 400, or 404 for another model."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the request is no valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ProtocolError(400, f"the request is a JSON {type(body).__name__}; expected an object with model and messages")
    body = {key: value for key, value in body.items() if value is not None}
    _refuse_unsupported(body)
    if body.get("model", name) != name:
        raise unknown_model(body["model"], name)
    choices = _number(body, "n", int, 1, 1, limits.most_choices)
    temperature = _number(body, "temperature", float, 1.0, 0, 2)
    top_p = _number(body, "top_p", float, 1.0, 0, 1)
    seed = _number(body, "seed", int, None, -(2**63), 2**63 - 1)
    settings = {
        "messages": _messages(body.get("messages")),
        "max_new_tokens": _most_new_tokens(body, limits),
        "temperature": temperature if top_p > 0 else 0.0,  # the smallest share is the likeliest token
        "top_p": top_p or 1.0,
        "stop": _stop(body),
        "thinking": _thinking(body),
        "logprobs": _logprobs(body),
    }
    try:
        requests = tuple(Request(**settings, seed=None if seed is None else seed + place) for place in range(choices))
    except ValueError as error:
        raise ProtocolError(400, str(error)) from None
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ProtocolError(400, f"stream_options is {options!r}; expected an object with include_usage", param="stream_options")
    if options and not body.get("stream"):
        raise ProtocolError(400, "stream_options is given without stream", param="stream_options")
    return Asked(requests, _flag(body, "stream"), _flag(options, "include_usage"))


def _refuse_unsupported(body: dict) -> None:
    for key, value in body.items():
        if key in NEUTRAL:
            # `in` would take False for 0.
            if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[key]):
                raise ProtocolError(400, f"{key} is not supported by this server; leave it out", param=key, code="unsupported_parameter")
        elif key not in READ and key not in IDLE:
            known = ", ".join(READ)
            raise ProtocolError(400, f"unknown parameter {key!r}; this server knows {known}", param=key, code="unknown_parameter")


def _number(body: dict, key: str, kind: type, default, low, high):
    value = body.get(key, default)
    if value is None:
        return None
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool) and low <= value <= high
    if not fits:  # so written, NaN is refused too
        words = "a whole number" if kind is int else "a number"
        raise ProtocolError(400, f"{key} is {value!r}; expected {words} from {low} to {high}", param=key, code="invalid_value")
    return value


def _flag(body: dict, key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise ProtocolError(400, f"{key} is {value!r}; expected true or false", param=key)
    return value


def _most_new_tokens(body: dict, limits: Limits) -> int:
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise ProtocolError(400, "both max_tokens and max_completion_tokens are given; expected one of them", param="max_tokens")
    key = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
    return _number(body, key, int, limits.most_new_tokens, 1, limits.most_new_tokens)


def _stop(body: dict) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(text, str) for text in stop):
        raise ProtocolError(400, f"stop is {str(stop)[:80]}; expected a text or a list of at most {MOST_STOPS} texts", param="stop")
    return tuple(text for text in stop if text)


def _thinking(body: dict) -> bool | None:
    """The switch of a reasoning checkpoint, where other servers have it too."""
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or options.keys() - {"enable_thinking"} or not isinstance(options.get("enable_thinking"), bool | None):
        message = f"chat_template_kwargs is {str(options)[:80]}; expected an object with enable_thinking, true or false"
        raise ProtocolError(400, message, param="chat_template_kwargs")
    return options.get("enable_thinking")


def _logprobs(body: dict) -> int | None:
    top = _number(body, "top_logprobs", int, None, 0, MOST_LOGPROBS)
    if _flag(body, "logprobs"):
        return top or 0
    if top:
        raise ProtocolError(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
    return None


def _messages(messages) -> list[dict]:
    """Messages for the engine, their pictures opened."""
    if not isinstance(messages, list) or not messages:
        raise ProtocolError(400, "messages is missing or empty; expected a list of messages", param="messages")
    result = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role = message.get("role") if isinstance(message, dict) else message
        if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
            raise ProtocolError(400, f"{where} has the role {str(role)[:40]!r}; expected one of {', '.join(ROLES)}", param=f"{where}.role")
        if message.get("tool_calls") or message.get("function_call"):
            raise ProtocolError(400, f"{where} calls tools, which this server does not support", param=where, code="unsupported_parameter")
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, list):
            content = [_part(part, role, f"{where}.content[{number}]") for number, part in enumerate(content)]
        elif not isinstance(content, str):
            found = type(content).__name__
            raise ProtocolError(400, f"{where}.content is a {found}; expected a text or a list of parts", param=f"{where}.content")
        result.append({"role": ROLES[role], "content": content})
    return result


def _part(part, role: str, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url" and role == "user":
        url = part.get("image_url")
        try:
            return {"type": "image", "image": open_sent_picture(url.get("url") if isinstance(url, dict) else url)}
        except ValueError as error:
            raise ProtocolError(400, f"{where}: {error}", param=where, code="invalid_image") from None
    raise ProtocolError(400, f"{where} is {str(part)[:80]!r}; expected text, or an image_url in a user's message", param=where)


def usage(answers: Sequence[Answer]) -> dict:
    """Tokens of all answers to one prompt. cached_tokens: of the prompt's, those that were not computed for it alone."""
    prompt, said = answers[0].prompt_tokens, sum(answer.generated_tokens for answer in answers)
    details = {"cached_tokens": answers[0].shared_tokens, "image_tokens": answers[0].visual_tokens}
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said, "prompt_tokens_details": details}


Describe = Callable[[Sequence[TokenLogprobs]], list[dict]]


def _told(logprobs: Sequence[TokenLogprobs] | None, describe: Describe | None) -> dict | None:
    return None if logprobs is None else {"content": describe(logprobs), "refusal": None}


def completion(head: dict, answers: Sequence[Answer], describe: Describe | None = None) -> dict:
    """The reply to a request without `stream`. head: id, created and model, the same in every chunk of a reply. describe: puts tokens and
    their log-probabilities into words; may be None where no request asked for them."""
    choices = [
        {
            "index": place,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _told(answer.logprobs, describe),
            "finish_reason": FINISH_REASONS[answer.stop_reason],
        }
        for place, answer in enumerate(answers)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(answers)}


def chunk(
    head: dict,
    place: int | None,
    *,
    piece: str | None = None,
    answer: Answer | None = None,
    first: bool = False,
    logprobs: Sequence[TokenLogprobs] | None = None,
    describe: Describe | None = None,
) -> dict:
    """One event of a stream: the beginning of a choice, a piece of its text, or its end, with what is told of tokens since the one before.
    place None: no choice (the usage at the end)."""
    delta = {"role": "assistant", "content": ""} if first else {} if piece is None else {"content": piece}
    finish = None if answer is None else FINISH_REASONS[answer.stop_reason]
    choices = [] if place is None else [{"index": place, "delta": delta, "logprobs": _told(logprobs, describe), "finish_reason": finish}]
    return {**head, "object": "chat.completion.chunk", "choices": choices}


def model_entry(name: str, created: int) -> dict:
    """The model as /v1/models lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nemotron-h-vision"}
