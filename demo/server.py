"""The OpenAI-compatible server: `python demo/server.py --model DIR`, then any client of chat completions with base_url http://HOST:PORT/v1.

What is asked and replied is in `openai_protocol.py`; every answer comes from `vlm.engine.Engine`, which decodes the requests of all clients
together. A client that goes away ends its request. Nothing is fetched from the network: pictures are sent as data URLs.
"""

import argparse
import asyncio
import hmac
import json
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.opening import address, check_packages, open_engine, reserve_port, serve_app

__all__ = ["build_app", "main"]

KEY_VARIABLE = "NEMOTRON_H_VISION_API_KEY"
MOST_BODY_BYTES = 64 * 2**20
MOST_OPEN = 256  # answers waiting or under way; each has a thread that mostly sleeps
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+(?<!:80)(?<!:443)")
LOOK_SECONDS = 0.25  # between two looks whether a client without a stream is still there


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model to clients of OpenAI's chat completions.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder of a training run or python -m vlm.assemble")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any free one (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), metavar="TEXT",
                        help=f"what clients must send as their key (default: the environment variable {KEY_VARIABLE}; without it no key is "
                        "needed)")  # fmt: skip
    parser.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN",
                        help="an origin (https://example.org), or *, whose web pages may talk to this server; repeatable")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer a client may ask for (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, help="most answers decoded together, where memory allows (default: the engine's 128)")
    parser.add_argument(
        "--max-open", type=int, default=MOST_OPEN, help="most answers waiting or under way; more get 429 (default: %(default)s)"
    )
    parser.add_argument("--memory-gb", type=float, help="memory for generation state (default: a quarter of what is free)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the checkpoint's")
    parser.add_argument("--quantize", choices=("int8",), help="weight-only quantised decoder")
    parser.add_argument("--on-drift", choices=("refuse", "warn", "ignore"), default="refuse",
                        help="when pictures, ids or logits are not those of the model's golden pack (default: %(default)s)")  # fmt: skip
    return parser.parse_args(arguments)


def build_app(engine, name: str, limits=None, *, api_key: str | None = None, most_open: int = MOST_OPEN, origins: Sequence[str] = ()):
    """The FastAPI app that serves `engine` as the model `name`. limits: a demo.openai_protocol.Limits; origins: of web pages that browsers
    let talk to it."""
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    from demo.desk import Desk
    from demo.openai_protocol import Limits, ProtocolError, chunk, completion, model_entry, read_request, unknown_model, usage
    from demo.token_logprobs import TokenWords

    limits, desk, started = limits or Limits(), Desk(engine, most_open), int(time.time())
    describe = TokenWords(engine.processor.tokenizer).describe

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(desk.close)

    class EventStream(StreamingResponse):
        """Ends its tickets however it ends: a client may be gone before the first event."""

        def __init__(self, events, tickets):
            super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
            self.tickets = tickets

        async def __call__(self, scope, receive, send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                desk.leave(self.tickets)

    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ProtocolError)
    async def told(request: Request, error: ProtocolError):
        headers = {"Retry-After": "1"} if error.status == 429 else {"Connection": "close"} if error.status == 413 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown_place(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}; this server has /v1/chat/completions, /v1/models and /health"
        return JSONResponse(ProtocolError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return JSONResponse(ProtocolError(500, f"{type(error).__name__}: {error}").body, 500)

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), api_key.encode()):
            raise ProtocolError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")

    async def read_body(request: Request) -> bytes:
        # Without this any page could ask in its visitor's name: browsers send what they take for a form without asking first.
        if "origin" in request.headers and "application/json" not in request.headers.get("content-type", ""):
            raise ProtocolError(415, "a request from a web page needs Content-Type: application/json")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= MOST_BODY_BYTES:
                parts.append(part)
            elif size > 4 * MOST_BODY_BYTES:  # up to here the rest is read and dropped: a client that is still sending sees no reply
                break
        if size > MOST_BODY_BYTES:
            raise ProtocolError(413, f"the request has more than {MOST_BODY_BYTES >> 20} MiB; send smaller pictures")
        return b"".join(parts)

    async def events(head: dict, tickets: list, include_usage: bool) -> AsyncIterator[str]:
        def event(content: dict) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        sent = [0] * len(tickets)  # tokens of each that have been told of

        def part(place: int, **what) -> str:
            if (logprobs := tickets[place].logprobs) is not None:
                # OpenAI's own client counts twice what comes with the first event of a choice.
                logprobs = [] if what.get("first") else logprobs[sent[place] :]
                sent[place] += len(logprobs)
            what |= {"logprobs": logprobs, "describe": describe}
            return event(chunk(head, place, **what) | ({"usage": None} if include_usage else {}))

        queue = desk.read_along(tickets)
        for place in range(len(tickets)):
            yield part(place, first=True)
        left = len(tickets)
        while left:
            place, item = await queue.get()
            if isinstance(item, str):
                yield part(place, piece=item)
                continue
            error = str(item) if isinstance(item, Exception) else item.error
            if error is not None:  # the status is sent already: an error event, as clients of OpenAI's expect it, and no [DONE]
                yield event(ProtocolError(500, error).body)
                return
            yield part(place, answer=item)
            left -= 1
        if include_usage:
            yield event(chunk(head, None) | {"usage": usage([ticket.answer for ticket in tickets])})
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        check_key(request)
        body = await read_body(request)
        asked = await asyncio.to_thread(read_request, body, name, limits)  # in a thread: pictures are decoded here
        tickets = await desk.submit(asked.requests)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name, "system_fingerprint": None}
        if asked.stream:
            return EventStream(events(head, tickets, asked.include_usage), tickets)
        try:
            waiting = desk.results(tickets)
            while not (await asyncio.wait([waiting], timeout=LOOK_SECONDS))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)  # to nobody
            answers = waiting.result()
        finally:
            desk.leave(tickets)
        if failed := next((answer.error for answer in answers if answer.error is not None), None):
            raise ProtocolError(500, failed)
        if answers[0].logprobs is None:
            return JSONResponse(completion(head, answers))
        # Megabytes for long answers: in a thread, or all streams stand still meanwhile.
        return await asyncio.to_thread(lambda: JSONResponse(completion(head, answers, describe)))

    @app.get("/v1/models")
    async def models(request: Request):
        check_key(request)
        return {"object": "list", "data": [model_entry(name, started)]}

    @app.get("/v1/models/{wanted:path}")
    async def model(request: Request, wanted: str):
        check_key(request)
        if wanted != name:
            raise unknown_model(wanted, name)
        return model_entry(name, started)

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": name, "open": len(desk.tickets), "golden": engine.golden_note}

    if not origins:
        return app
    # Around all of it, or a page could not read the errors that nobody expected.
    return CORSMiddleware(app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=("Retry-After",))


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code: 2 with one line on stderr for what a user can put right."""
    args = parse_arguments(arguments)
    try:
        check_packages("server", ("fastapi", "uvicorn"))
        for option in ("max_new_tokens", "max_batch", "max_open"):
            if getattr(args, option) is not None and getattr(args, option) < 1:
                raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; expected at least 1")
        for origin in args.allow_origin:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--allow-origin is {origin!r}; expected * or scheme://host[:port] as browsers send it: small letters, no path"
                )
        with reserve_port(args.host, args.port) as listener:
            import torch

            from demo.openai_protocol import Limits

            engine = open_engine(
                args.model,
                args.max_new_tokens,
                device=args.device,
                dtype=getattr(torch, args.dtype) if args.dtype else None,
                on_drift=args.on_drift,
                **({} if args.max_batch is None else {"max_batch": args.max_batch}),
                memory_bytes=int(args.memory_gb * 1e9) if args.memory_gb is not None else None,
                quantize=args.quantize,
            )
            name = args.name or args.model.resolve().name
            limits = Limits(most_new_tokens=args.max_new_tokens)
            app = build_app(engine, name, limits, api_key=args.api_key or None, most_open=args.max_open, origins=args.allow_origin)
            print(f"{name} at {address(args.host, listener)}/v1  (Ctrl-C ends it)", flush=True)
            serve_app(app, listener)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"server: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
