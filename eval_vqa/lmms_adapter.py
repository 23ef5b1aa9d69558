"""Our checkpoints as a model of lmms-eval, so that its two hundred tasks can be run with them.

lmms-eval has many and exact requirements, so it is installed apart and this package into that environment. Its entry-point group finds the
model by itself (`lmms-eval --model nemotron_h_vision ...`); without the entry point this file starts lmms-eval with the model registered:

    python eval_vqa/lmms_adapter.py eval --model nemotron_h_vision --model_args pretrained=DIR --tasks vizwiz_vqa_val

Prompts, splits and scores are lmms-eval's then, which differ from the official ones in places (docs/evaluation.md). All questions of a task
go to the engine at once, so that those about one picture share its work; lmms-eval's own loop asks one by one.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

__all__ = ["MODEL_NAME", "main", "manifest"]

MODEL_NAME = "nemotron_h_vision"
CLASS_NAME = "NemotronHVision"
DEFAULT_NEW_TOKENS = 64  # where a task does not say


def manifest():
    """What lmms-eval's entry-point group "lmms_eval.models" loads. Raises ImportError when lmms-eval is not installed."""
    return _lmms_eval("lmms_eval.models.registry_v2").ModelManifest(MODEL_NAME, chat_class_path=f"eval_vqa.lmms_adapter.{CLASS_NAME}")


def main(argv: list[str] | None = None) -> int:
    """lmms-eval's own command line with our model registered; 2 with one line when lmms-eval is not there."""
    try:
        models = _lmms_eval("lmms_eval.models")
        models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
        start = _lmms_eval("lmms_eval.cli.dispatch").main
    except ImportError as error:
        print(f"lmms_adapter: {error}", file=sys.stderr)
        return 2
    sys.argv = ["lmms-eval", *(sys.argv[1:] if argv is None else argv)]
    return start() or 0


def __getattr__(name: str):
    """The model class is made when it is asked for: its base class is lmms-eval's."""
    if name != CLASS_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[CLASS_NAME] = _model_class()
    return globals()[CLASS_NAME]


def _lmms_eval(module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lmms_eval":
            raise
        raise ImportError("lmms-eval is not installed; in an environment of its own: pip install lmms-eval && pip install -e .") from error


def _model_class() -> type:
    from vlm.engine import Engine, Request
    from vlm.thinking import strip_thinking

    class NemotronHVision(_lmms_eval("lmms_eval.api.model").lmms):
        """pretrained: checkpoint folder. max_batch, max_tokens, on_drift: see `vlm.engine.Engine`; dtype: float32, bfloat16 or float16.
        thinking: let a reasoning checkpoint think first (False: the tasks allow an answer of a few tokens, which no thought ends within).

        batch_size is lmms-eval's and is not used: the engine makes its own batches.
        """

        is_simple = False
        thinking = False

        def __init__(
            self, pretrained, device=None, batch_size=1, dtype=None, max_batch=None, max_tokens=None, on_drift="refuse", thinking=False,
            **unknown,
        ):  # fmt: skip
            super().__init__()
            if unknown:
                known = "pretrained, device, dtype, max_batch, max_tokens, on_drift, thinking"
                raise ValueError(f"unknown model_args {', '.join(sorted(unknown))}; this model takes {known}")
            import torch

            from vlm.device import default_device

            settings = {name: int(value) for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens)) if value is not None}
            settings["on_drift"] = on_drift
            settings |= {"device": device or default_device(), "dtype": dtype and getattr(torch, dtype)}
            self.engine = Engine.from_pretrained(pretrained, **settings)
            self.device = next(self.engine.model.parameters()).device
            self.batch_size = batch_size
            self.thinking = str(thinking).lower() in ("true", "1", "yes")

        @property
        def tokenizer(self):
            return self.engine.processor.tokenizer

        def generate_until(self, requests) -> list[str]:
            """Answers in request order. Raises ValueError for a question that cannot be answered, e.g. one about a video."""
            answers = self.engine.generate([self._request(*request.args) for request in requests])
            if failed := [answer.error for answer in answers if answer.error]:
                raise ValueError(f"{len(failed)} of {len(answers)} questions could not be answered, the first: {failed[0]}")
            return [strip_thinking(answer.text) for answer in answers]

        def _request(self, context, doc_to_messages, kwargs, doc_id, task, split):
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            until = kwargs.get("until") or []
            temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample", True) else 0.0
            return Request(
                [{"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages],
                max_new_tokens=int(kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or DEFAULT_NEW_TOKENS),
                temperature=temperature,
                top_p=float(kwargs.get("top_p") or 1.0),
                seed=doc_id if temperature > 0 else None,
                stop=(until,) if isinstance(until, str) else tuple(until),
                thinking=self.thinking,
            )

        def loglikelihood(self, requests):
            raise NotImplementedError("this model answers by generating; choose a task with output_type generate_until")

        def generate_until_multi_round(self, requests):
            raise NotImplementedError("tasks of several rounds are not supported; choose a task with output_type generate_until")

    NemotronHVision.__module__, NemotronHVision.__qualname__ = __name__, CLASS_NAME
    return NemotronHVision


def _part(part: dict) -> dict:
    """A part of an lmms-eval message as ours: {"type": "image", "url": PIL image or path} or text. Videos and sounds are refused."""
    if part["type"] == "image":
        return {"type": "image", "image": part["url"]}
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"this model sees images and text; the task has a part of type {part['type']!r}")


if __name__ == "__main__":
    sys.exit(main())
