"""The page of the image chat: its layout, its look, and how turns are shown. gradio is needed only when a page is built.

Whatever a user or the model writes is shown as text; the only HTML on the page is our own.
"""

import os
import re
from pathlib import Path

from vlm.thinking import split_thinking

from .chat import Step, Turn, ask
from .tile_view import TILE_STYLE, tiles_html

__all__ = ["MOST_NEW_TOKENS", "build_page", "chat_messages"]

MOST_NEW_TOKENS = 1024
MOST_ASKING = 16  # visitors answered at once: the engine decodes them together; more wait in gradio's queue
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
WELCOME = "### Drop a picture and ask about it\nThen ask again: the picture stays in the conversation."
NO_TILES = '<p class="quiet">The tiles appear here with the first picture you ask about.</p>'
STYLE = """
.gradio-container{width:100%!important;max-width:1320px!important;margin:0 auto!important}
#head h1{font-size:24px;margin:0;letter-spacing:-.01em}
#head{min-width:0!important}
#head p{margin:2px 0 0;color:var(--body-text-color-subdued)}
#chat{border-radius:12px}
#chat img{max-height:260px;width:auto}
#chat button[title=Share],#chat button[aria-label=Share]{display:none}
#side{background:var(--background-fill-secondary);border:1px solid var(--border-color-primary);border-radius:12px;padding:16px}
#side h2{font-size:16px;margin:0}
.quiet p,p.quiet,#status p{color:var(--body-text-color-subdued);font-size:var(--text-sm)}
#examples{border:0;background:none;padding:0}
#examples .grid-wrap{padding:0;height:auto;max-height:none;overflow:visible;min-height:0}
#examples .grid-container{padding:0;gap:8px;grid-template-columns:repeat(auto-fill,minmax(76px,1fr))!important}
#side .html-container{padding:0}
"""


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
    """The turns as gradio's chatbot takes them; thoughts before an answer fold away under a title. A failed turn names its pictures instead
    of showing them: they may be what is broken."""
    messages = []
    for place, turn in enumerate(turns):
        shown = [f"[{_plain(Path(path).name)}]" if turn.error else {"path": path} for path in turn.pictures]
        messages.append({"role": "user", "content": [*shown, _plain(turn.question)]})
        waits = not is_done and place == len(turns) - 1
        thoughts, answer = split_thinking(turn.answer)
        if thoughts:
            status = "pending" if waits and not answer else "done"
            messages.append({"role": "assistant", "content": _plain(thoughts), "metadata": {"title": "Thoughts", "status": status}})
        if waits or turn.error:
            without = "…" if waits else ""
        else:
            without = "*(no answer behind its thoughts)*" if thoughts else "*(the model ended its turn without a word)*"
        answer = _answer_markdown(answer) or without
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


def build_page(engine, model_name: str, examples: list[str] = (), instruction: str = ""):
    """The page as gr.Blocks, and what mounting it needs beside it (theme, css, allowed_paths). instruction: what stands under every
    question until a user changes it. Raises ImportError without gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    settings = engine.processor.image_processor
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", radius_size="lg",
        font=[gr.themes.Font(name) for name in FONTS], font_mono=[gr.themes.Font(name) for name in MONO_FONTS],
    )  # fmt: skip
    tokens = engine.processor.visual_tokens_per_tile
    facts = f"Tiles of {settings.tile_size} px, at most {settings.max_tiles} a picture, {tokens} visual tokens each."

    chat_format = engine.processor.renderer.chat_format
    can_think = bool(chat_format.think_open)

    def answer(box, turns, max_new_tokens, temperature, instruction="", thinking=None):
        text, files = (box or {}).get("text", ""), (box or {}).get("files", [])
        if not text.strip():
            gr.Warning("Type a question about the picture, then send." if files else "Type a question, then send.")
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
            return
        busy = gr.MultimodalTextbox(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)
        wishes = {"max_new_tokens": int(max_new_tokens), "temperature": temperature, "instruction": instruction or ""}
        if can_think:
            wishes["thinking"] = thinking
        for step in ask(engine, turns, text, files, **wishes):
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
            clear = gr.Button("Clear", variant="secondary", size="md", scale=0, min_width=96)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
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
                        list(examples), show_label=False, columns=6, object_fit="contain", allow_preview=False, interactive=False,
                        buttons=[], elem_id="examples",
                    )  # fmt: skip
            with gr.Column(scale=2, min_width=320, elem_id="side"):
                gr.Markdown("## What the model saw")
                tiles = gr.HTML(NO_TILES, padding=False)
                status = gr.Markdown("", elem_id="status")
                with gr.Accordion("Settings", open=False):
                    longest = MOST_NEW_TOKENS if can_think else 128
                    max_new_tokens = gr.Slider(1, MOST_NEW_TOKENS, value=longest, step=1, label="Longest answer, tokens")
                    temperature = gr.Slider(0.0, 2.0, value=0.0, step=0.05, label="Temperature (0: no chance)")
                    instruction = gr.Textbox(instruction, label="Added under every question", placeholder="nothing")
                    thinking = gr.Checkbox(chat_format.thinks, label="Think before the answer", visible=can_think)
        asking = box.submit(
            answer, [box, turns, max_new_tokens, temperature, instruction, thinking], [chatbot, turns, tiles, status, box],
            concurrency_limit=MOST_ASKING, show_progress="hidden", api_name="ask",
        )  # fmt: skip
        box.stop(stopped, turns, [chatbot, status, box], cancels=[asking], show_progress="hidden", api_visibility="private", queue=False)
        for event in (clear.click, chatbot.clear):
            event(cleared, None, [chatbot, turns, tiles, status, box], cancels=[asking], api_visibility="private", queue=False)
        if examples:
            gallery.select(take_example, box, box, show_progress="hidden", api_visibility="private", queue=False)
    return page, {"theme": theme, "css": STYLE + TILE_STYLE, "allowed_paths": list(examples)}
