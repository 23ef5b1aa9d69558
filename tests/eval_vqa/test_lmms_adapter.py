"""The lmms-eval adapter against a stand-in of its API (0.7), and against the real one where that is installed."""

import importlib.util
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import eval_vqa.lmms_adapter as adapter

ROOT = Path(__file__).parents[2]
ABSENT = importlib.util.find_spec("lmms_eval") is None


@dataclass
class Instance:
    args: tuple


@pytest.fixture
def stand_in(monkeypatch):
    """The three modules of lmms-eval that the adapter touches; its base class has the same attributes as the real one."""

    class lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple = ()

    names = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": lmms}, "lmms_eval.models": {},
             "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}}  # fmt: skip
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(vars(adapter), "NemotronHVision", raising=False)
    yield lmms
    vars(adapter).pop("NemotronHVision", None)


class Answering:
    """An engine that says what it was asked."""

    def __init__(self, error=None):
        self.requests, self.error = [], error

    def generate(self, requests):
        from vlm.engine import Answer

        self.requests += requests
        return [Answer(f"<think>hm</think>answer {place}", "end", error=self.error) for place, _ in enumerate(requests)]


def make_model(stand_in, **options):
    model = adapter.NemotronHVision.__new__(adapter.NemotronHVision)
    stand_in.__init__(model)
    model.engine = Answering(**options)
    model.task_dict = {"vqa": {"val": [{"image": Image.new("RGB", (2, 2)), "question": f"q{number}"} for number in range(3)]}}
    return model


def doc_to_messages(doc):
    return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]}]


def test_the_entry_point_of_the_distribution_names_the_manifest():
    """lmms-eval finds the model by it; a renamed function would only be missed by a user."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert groups["lmms_eval.models"] == {adapter.MODEL_NAME: f"{adapter.__name__}:{adapter.manifest.__name__}"}


def test_a_reasoning_checkpoint_does_not_think_unless_told(stand_in):
    """Tasks allow sixteen tokens or so; thoughts do not end within them, and every answer was empty."""
    model = make_model(stand_in)
    for thinking in (False, True):
        model.thinking = thinking
        model.generate_until([Instance(("", doc_to_messages, {}, 0, "vqa", "val"))])
    assert [request.thinking for request in model.engine.requests] == [False, True]


def test_it_is_a_chat_model_of_the_harness(stand_in):
    assert issubclass(adapter.NemotronHVision, stand_in)
    assert adapter.NemotronHVision.is_simple is False
    found = adapter.manifest()
    module, name = found.chat_class_path.rsplit(".", 1)
    assert (found.model_id, getattr(importlib.import_module(module), name)) == ("nemotron_h_vision", adapter.NemotronHVision)


def test_all_questions_go_to_the_engine_at_once_and_thoughts_are_stripped(stand_in):
    model = make_model(stand_in)
    kwargs = {"max_new_tokens": 16, "temperature": 0, "until": ["\n\n"], "do_sample": False}
    answers = model.generate_until([Instance(("ctx", doc_to_messages, kwargs, number, "vqa", "val")) for number in range(3)])
    assert answers == ["answer 0", "answer 1", "answer 2"]
    request = model.engine.requests[1]
    image, text = request.messages[0]["content"]
    assert (image["type"], image["image"].size, text) == ("image", (2, 2), {"type": "text", "text": "q1"})
    assert (request.max_new_tokens, request.temperature, request.stop, request.seed) == (16, 0.0, ("\n\n",), None)


def test_sampling_has_a_seed_of_its_own_for_each_question(stand_in):
    model = make_model(stand_in)
    kwargs = {"temperature": 0.7, "top_p": 0.9, "until": "stop"}
    model.generate_until([Instance(("", doc_to_messages, kwargs, number, "vqa", "val")) for number in (0, 2)])
    assert [(request.seed, request.temperature, request.top_p) for request in model.engine.requests] == [(0, 0.7, 0.9), (2, 0.7, 0.9)]
    assert model.engine.requests[0].stop == ("stop",)
    assert model.engine.requests[0].max_new_tokens == 64


def test_a_question_that_cannot_be_answered_stops_the_harness(stand_in):
    with pytest.raises(ValueError, match="1 of 1 questions could not be answered, the first: too long"):
        make_model(stand_in, error="too long").generate_until([Instance(("", doc_to_messages, {}, 0, "vqa", "val"))])


def test_videos_are_refused(stand_in):
    def video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]

    with pytest.raises(ValueError, match="part of type 'video'"):
        make_model(stand_in).generate_until([Instance(("", video, {}, 0, "vqa", "val"))])


def test_other_kinds_of_tasks_say_what_to_choose(stand_in):
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="generate_until"):
            getattr(make_model(stand_in), method)([])


def test_unknown_model_args_are_named(stand_in):
    with pytest.raises(ValueError, match="unknown model_args colour"):
        adapter.NemotronHVision("folder", colour="red")


@pytest.mark.skipif(not ABSENT, reason="lmms-eval is installed here")
def test_without_lmms_eval_it_is_one_line_with_the_command():
    done = subprocess.run([sys.executable, "eval_vqa/lmms_adapter.py"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "pip install lmms-eval" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(ABSENT, reason="lmms-eval is not installed: pip install lmms-eval, in an environment of its own")
def test_the_real_harness_finds_the_model():
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(adapter.manifest(), overwrite=True)
    assert MODEL_REGISTRY_V2.get_model_class("nemotron_h_vision") is adapter.NemotronHVision
    assert not getattr(adapter.NemotronHVision, "__abstractmethods__", ())


def test_an_unknown_name_of_the_module_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_this"):
        adapter.nothing_like_this  # noqa: B018
