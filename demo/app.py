"""The image chat: `python demo/app.py --model DIR`, then a page on which to drop a picture and ask about it.

This file starts the program and lays out the page. What is said and to whom is in `chat.py`, how tiles are shown in `tile_view.py`;
every answer comes from `vlm.engine.Engine`, the same one that evaluation uses. Nothing is fetched from the network and nothing is sent.
"""

import argparse
import errno
import os
import re
import socket
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.chat import Step, Turn, ask
from demo.tile_view import TILE_STYLE, tiles_html

__all__ = ["build_page", "chat_messages", "check_port", "find_examples", "main"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_EXAMPLES = 12
MOST_NEW_TOKENS = 1024
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
WELCOME = "### Drop a picture and ask about it\nThen ask again: the picture stays in the conversation."
NO_TILES = '<p class="quiet">The tiles appear here with the first picture you ask about.</p>'
STYLE = """
.gradio-container{max-width:1320px!important;margin:0 auto!important}
#head h1{font-size:24px;margin:0;letter-spacing:-.01em}
#head p{margin:2px 0 0;color:var(--body-text-color-subdued)}
#chat{border-radius:12px}
#chat img{max-height:260px;width:auto}
#chat button[title=Share],#chat button[aria-label=Share]{display:none}
#side{background:var(--background-fill-secondary);border:1px solid var(--border-color-primary);border-radius:12px;padding:16px}
#side h2{font-size:16px;margin:0}
.quiet p,p.quiet,#status p{color:var(--body-text-color-subdued);font-size:var(--text-sm)}
#examples{border:0;background:none;padding:0}
#examples .grid-wrap,#examples .grid-container{padding:0;gap:8px}
"""


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the demo needs gradio ({error}); pip install 'nemotron-h-vision[demo]'") from error
    return gradio


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


def check_port(host: str, port: int) -> None:
    """Raise OSError with one clear line when `host:port` cannot be listened on."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is in use; stop the other program or give another one with --port") from error
        raise OSError(f"cannot listen on {host}:{port} ({error}); check --host and --port") from error


def _plain(text: str) -> str:
    """Markdown that shows `text` letter by letter: a user's `<image>` or `*` is neither a tag nor a star."""
    text = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _answer_markdown(text: str) -> str:
    """The model's Markdown, in which HTML outside of code is text."""
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]+`)", text, flags=re.S)  # every second one is code
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    return "".join(parts)


def chat_messages(turns: tuple[Turn, ...], is_done: bool = True) -> list[dict]:
    """The turns as gradio's chatbot takes them. A failed turn names its pictures instead of showing them: they may be what is broken."""
    messages = []
    for place, turn in enumerate(turns):
        shown = [f"[{_plain(Path(path).name)}]" if turn.error else {"path": path} for path in turn.pictures]
        messages.append({"role": "user", "content": [*shown, _plain(turn.question)]})
        waits = not is_done and place == len(turns) - 1
        answer = _answer_markdown(turn.answer) or ("…" if waits else "" if turn.error else "*(the model ended its turn without a word)*")
        if turn.error:
            answer = f"{answer}\n\n**No answer:** {_plain(turn.error)}" if answer else f"**No answer:** {_plain(turn.error)}"
        messages.append({"role": "assistant", "content": answer})
    return messages


def _status(step: Step) -> str:
    if step.views is None:
        return "Reading the picture …" if not step.is_done else ""
    words = f"Prompt of {step.prompt_tokens:,} tokens, {step.visual_tokens:,} of them visual. {step.seconds:.1f} s"
    words += "." if step.is_done else " so far …"
    return " ".join([words, *(f"{_plain(receipt)}." for receipt in step.receipts)])


def build_page(engine, model_name: str, examples: list[str] = ()):
    """The page as gr.Blocks, and what `launch` needs beside it (theme, css, allowed_paths). Raises ImportError without gradio."""
    gr = _gradio()
    settings = engine.processor.image_processor
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", radius_size="lg",
        font=[gr.themes.Font(name) for name in FONTS], font_mono=[gr.themes.Font(name) for name in MONO_FONTS],
    )  # fmt: skip
    tokens = engine.processor.visual_tokens_per_tile
    facts = f"Tiles of {settings.tile_size} px, at most {settings.max_tiles} a picture, {tokens} visual tokens each."

    def answer(box, turns, max_new_tokens, temperature):
        text, files = (box or {}).get("text", ""), (box or {}).get("files", [])
        if not text.strip():
            gr.Warning("Type a question about the picture, then send." if files else "Type a question, then send.")
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
            return
        busy = gr.MultimodalTextbox(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)
        for step in ask(engine, turns, text, files, max_new_tokens=int(max_new_tokens), temperature=temperature):
            if step.is_done:
                busy = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
            tiles = gr.skip() if step.views is None else tiles_html(step.views) if step.views else NO_TILES
            yield chat_messages(step.turns, step.is_done), step.turns, tiles, _status(step), busy
            busy = gr.skip()

    def stopped(turns):
        return chat_messages(turns), "Stopped.", gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

    def cleared():
        return [], (), NO_TILES, "", gr.MultimodalTextbox(value={"text": "", "files": []}, submit_btn=True, stop_btn=False)

    def take_example(box, event: gr.SelectData):
        return {"text": (box or {}).get("text", ""), "files": [examples[event.index]]}

    with gr.Blocks(title=f"{model_name}: image chat", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        turns = gr.State(())
        with gr.Row(equal_height=False):
            gr.Markdown(f"# Ask {_plain(model_name)} about a picture\n{facts}", elem_id="head")
            clear = gr.Button("Clear the conversation", variant="secondary", size="md", scale=0, min_width=210)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                chatbot = gr.Chatbot(
                    elem_id="chat", height=520, show_label=False, placeholder=WELCOME, buttons=["copy"], layout="bubble",
                    latex_delimiters=[], allow_tags=False, feedback_options=None,
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    show_label=False, placeholder="Drop or paste a picture here, type a question", sources=["upload"], file_types=["image"],
                    file_count="multiple", autofocus=True, max_plain_text_length=100_000,
                )  # fmt: skip
                if examples:
                    gr.Markdown("Example pictures: click one, then ask.", elem_classes="quiet")
                    gallery = gr.Gallery(
                        list(examples), show_label=False, columns=8, object_fit="contain", allow_preview=False, interactive=False,
                        buttons=[], elem_id="examples",
                    )  # fmt: skip
            with gr.Column(scale=2, min_width=320, elem_id="side"):
                gr.Markdown("## What the model saw")
                tiles = gr.HTML(NO_TILES, padding=False)
                status = gr.Markdown("", elem_id="status")
                with gr.Accordion("Settings", open=False):
                    max_new_tokens = gr.Slider(1, MOST_NEW_TOKENS, value=128, step=1, label="Longest answer, tokens")
                    temperature = gr.Slider(0.0, 2.0, value=0.0, step=0.05, label="Temperature (0: always the likeliest word)")
        asking = box.submit(
            answer, [box, turns, max_new_tokens, temperature], [chatbot, turns, tiles, status, box],
            concurrency_limit=1, show_progress="hidden", api_name="ask",
        )  # fmt: skip
        box.stop(stopped, turns, [chatbot, status, box], cancels=[asking], show_progress="hidden", api_visibility="private", queue=False)
        for event in (clear.click, chatbot.clear):
            event(cleared, None, [chatbot, turns, tiles, status, box], cancels=[asking], api_visibility="private", queue=False)
        if examples:
            gallery.select(take_example, box, box, show_progress="hidden", api_visibility="private")
    return page, {"theme": theme, "css": STYLE + TILE_STYLE, "allowed_paths": list(examples)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat about pictures in the browser.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder of a training run or python -m vlm.assemble")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="folder of pictures to offer on the page")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code: 2 with one line on stderr for what a user can put right."""
    args = parse_arguments(arguments)
    try:
        _gradio()
        check_port(args.host, args.port)
        examples = find_examples(args.examples) if args.examples else []
        import torch

        from vlm.engine import Engine

        engine = Engine.from_pretrained(args.model, device=args.device or ("cuda" if torch.cuda.is_available() else None))
        # Room for the longest answer; a prompt beyond it loses tiles first, then it is refused.
        engine.max_tokens = max(engine.model.config.text_config.max_position_embeddings - MOST_NEW_TOKENS, 1)
        page, options = build_page(engine, args.model.resolve().name, examples)
        page.launch(
            server_name=args.host, server_port=args.port, quiet=True, prevent_thread_lock=True, share=False, inbrowser=False,
            ssr_mode=False, show_error=True, footer_links=[], run_history=False, max_file_size="50mb", **options,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"chat at http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
