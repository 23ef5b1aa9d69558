"""The image chat: `python demo/app.py --model DIR`, then a page on which to drop a picture and ask about it.

This file starts the program; what can fail quickly (port, examples, a missing package) fails before anything large is imported. The page
is in `page.py`, what is said and to whom in `chat.py`, how tiles are shown in `tile_view.py`; every answer comes from
`vlm.engine.Engine`, the same one that evaluation uses. Nothing is fetched from the network and nothing is sent.
"""

import argparse
import socket
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.opening import address, check_packages, open_engine, reserve_port, serve_app

__all__ = ["find_examples", "main", "serve"]

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
    from fastapi import FastAPI

    app = gradio.mount_gradio_app(
        FastAPI(), page, path="/", server_name=host, server_port=listener.getsockname()[1], footer_links=[], run_history=False,
        ssr_mode=False, show_error=True, max_file_size="50mb", **options,
    )  # fmt: skip
    print(f"chat at {address(host, listener)}  (Ctrl-C ends it)", flush=True)
    serve_app(app, listener)


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code: 2 with one line on stderr for what a user can put right."""
    args = parse_arguments(arguments)
    try:
        check_packages("demo", ("gradio", "fastapi", "uvicorn"))
        with reserve_port(args.host, args.port) as listener:
            examples = find_examples(args.examples) if args.examples else []
            from demo.page import MOST_NEW_TOKENS, build_page

            engine = open_engine(args.model, MOST_NEW_TOKENS, device=args.device, on_drift=args.on_drift)
            serve(*build_page(engine, args.model.resolve().name, examples, args.instruction), listener, args.host)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
