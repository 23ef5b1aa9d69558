"""The image chat: `python demo/app.py --model DIR`, then a page on which to drop a picture and ask about it.

This file starts the program; what can fail quickly (port, examples, a missing package) fails before anything large is imported. The page
is in `page.py`, what is said and to whom in `chat.py`, how tiles are shown in `tile_view.py`; every answer comes from
`vlm.engine.Engine`, the same one that evaluation uses. Nothing is fetched from the network and nothing is sent.
"""

import argparse
import errno
import importlib.util
import socket
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

__all__ = ["find_examples", "main", "reserve_port", "serve"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_EXAMPLES = 12


def find_examples(folder: str | Path) -> list[str]:
    """Up to twelve pictures of a folder, spread evenly over their sorted names. Raises FileNotFoundError / ValueError without any."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of examples at {folder}; expected a folder with pictures")
    found = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"found no picture in {folder}; expected files that end in {', '.join(PICTURE_SUFFIXES)}")
    count = min(len(found), MOST_EXAMPLES)
    return [found[number * len(found) // count] for number in range(count)]


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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat about pictures in the browser.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder of a training run or python -m vlm.assemble")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes any free one (default: %(default)s)")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="folder of pictures to offer on the page")
    parser.add_argument(
        "--instruction", default="", metavar="TEXT", help="a line to add under every question, as the model was trained with"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--on-drift", choices=("refuse", "warn", "ignore"), default="refuse",
                        help="when pictures, ids or logits are not those of the model's golden pack (default: %(default)s)")  # fmt: skip
    return parser.parse_args(arguments)


def serve(page, options: dict, listener: socket.socket, host: str) -> None:
    """Serve a page until Ctrl-C. gradio's own `launch` is not used: it calls its page over the network settings of the machine, proxy
    included, and gives up on a busy one."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    port = listener.getsockname()[1]
    app = gradio.mount_gradio_app(
        FastAPI(), page, path="/", server_name=host, server_port=port, footer_links=[], run_history=False, ssr_mode=False, show_error=True,
        max_file_size="50mb", **options,
    )  # fmt: skip
    print(f"chat at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code: 2 with one line on stderr for what a user can put right."""
    args = parse_arguments(arguments)
    try:
        missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"the demo needs {', '.join(missing)}; pip install 'nemotron-h-vision[demo]'")
        with reserve_port(args.host, args.port) as listener:
            examples = find_examples(args.examples) if args.examples else []
            import torch

            from demo.page import MOST_NEW_TOKENS, build_page
            from vlm.engine import Engine

            device = args.device or ("cuda" if torch.cuda.is_available() else None)
            engine = Engine.from_pretrained(args.model, device=device, on_drift=args.on_drift)
            print(engine.golden_note, flush=True)
            # Room for the longest answer; a prompt beyond it loses tiles first, then it is refused.
            engine.max_tokens = max(engine.model.config.text_config.max_position_embeddings - MOST_NEW_TOKENS, 1)
            serve(*build_page(engine, args.model.resolve().name, examples, args.instruction), listener, args.host)
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
