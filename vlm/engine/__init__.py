"""Answers from a model: many questions about one picture at the price of one, many callers at once, exactly as one by one."""

from .engine import Engine
from .request import Answer, Request, TokenLogprobs
from .ticket import Ticket

__all__ = ["Answer", "Engine", "Request", "Ticket", "TokenLogprobs"]
