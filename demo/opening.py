"""What both programs do before they serve: take their port, open the engine; and how they serve until Ctrl-C."""

import errno
import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path

__all__ = ["address", "check_packages", "open_engine", "reserve_port", "serve_app"]


def check_packages(program: str, names: Sequence[str]) -> None:
    """Raises ImportError with one line that says what to install."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the {program} needs {', '.join(missing)}; pip install 'nemotron-h-vision[demo]'")


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that listens on `host:port`; 0 takes any free port. Raises OSError with one clear line when that cannot be.

    It is taken before the model is read: a port in use is known at once, and nobody else gets the port meanwhile.
    """
    if not 0 <= port < 65536:
        raise OSError(f"{port} is no port; expected a number from 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"cannot listen on {host} ({error}); check --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is in use; stop the other program or give another one with --port") from error
        raise OSError(f"cannot listen on {host}:{port} ({error}); check --host and --port") from error
    return listener


def address(host: str, listener: socket.socket) -> str:
    """http://HOST:PORT, as a browser takes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def open_engine(folder: str | Path, most_new_tokens: int, *, device: str | None = None, **settings):
    """`Engine.from_pretrained` on the device there is, with room for the longest answer: a prompt beyond it loses tiles first, then it is
    refused. Prints what the golden pack said. Raises as that does."""
    from vlm.device import default_device
    from vlm.engine import Engine

    engine = Engine.from_pretrained(folder, device=device or default_device(), **settings)
    print(engine.golden_note, flush=True)
    engine.max_tokens = max(engine.model.config.text_config.max_position_embeddings - most_new_tokens, 1)
    return engine


def serve_app(app, listener: socket.socket) -> None:
    """Until Ctrl-C."""
    import uvicorn

    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])
