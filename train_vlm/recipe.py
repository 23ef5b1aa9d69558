"""How one run trains: a YAML file checked by frozen dataclasses, with overrides `a.b=c` from the command line.

What the model is lives in its folder; where the run happens comes from the launcher. An unknown key stops the run with the nearest valid
name, before any model is touched. The DeepSpeed dictionary is computed from the recipe: nobody writes one by hand.
"""

import dataclasses
import difflib
import glob
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from train_vlm.fp8_section import Fp8
from train_vlm.plan_section import Plan
from train_vlm.recipe_sections import Data, Lora, Optimizer, Part, Parts, RecipeError, Run, Source

__all__ = ["Data", "Fp8", "Lora", "Optimizer", "Part", "Parts", "Plan", "Recipe", "RecipeError", "Run", "Source", "load_recipe"]

SECTIONS = {"data": Data, "parts": Parts, "run": Run, "optimizer": Optimizer, "lora": Lora, "fp8": Fp8, "plan": Plan}


@dataclass(frozen=True)
class Recipe:
    """One run: stage (align or sft), the model folder to start from, the folder to write, and the sections; lora: adapters on the decoder
    (null: it trains itself); plan: what --dry-run assumes."""

    stage: str
    model: str
    out: str
    data: Data
    parts: Parts
    run: Run
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora | None = None
    fp8: Fp8 = field(default_factory=Fp8)
    plan: Plan | None = None

    def __post_init__(self):
        if self.optimizer.kind == "muon" and (self.run.zero_stage, self.run.precision) != (0, "float32"):
            raise RecipeError("optimizer.kind muon needs whole float32 matrices: set run.zero_stage to 0 and run.precision to float32")
        if self.out and (Path(self.out).name in ("", "..") or glob.has_magic(self.out)):  # "": of a loop that writes nothing
            # DeepSpeed finds a checkpoint by a pattern that the folder's name is part of: one with brackets would be written, never read.
            raise RecipeError(f"out is {self.out!r}; expected the name of a folder to make, without any of * ? [")
        if self.stage not in ("align", "sft"):
            raise RecipeError(f"stage is {self.stage!r}; expected align or sft")
        if self.stage == "align" and ("language_model" in self.parts.trained or "projector" not in self.parts.trained):
            raise RecipeError("stage align trains the projector with a frozen language model; for other parts use stage sft")
        if self.lora is not None and "language_model" not in self.parts.trained:
            raise RecipeError("lora puts adapters on the language model; give parts.language_model their learning rate")
        if self.lora is not None and self.optimizer.kind == "muon":
            raise RecipeError("lora with optimizer.kind muon: an adapter's matrices are too narrow for it; use adamw")

    def deepspeed_config(self, world_size: int) -> dict:
        """The dictionary DeepSpeed takes. Raises RecipeError when the batch does not divide."""
        share = world_size * self.data.micro_batches
        if self.data.batch_samples < world_size:
            raise RecipeError(f"data.batch_samples is {self.data.batch_samples}; expected at least one for each of {world_size} ranks")
        if self.data.pack_tokens is None and self.data.batch_samples % share:
            raise RecipeError(
                f"data.batch_samples is {self.data.batch_samples}; expected a multiple of ranks x micro_batches "
                f"= {world_size} x {self.data.micro_batches}"
            )
        config = {
            # A micro-batch is one packed row; how many samples it holds is ours to know.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.data.micro_batches,
            # Without ZeRO the step clips by itself (training_step.py): DeepSpeed would, too, but keeps the norm to itself.
            "gradient_clipping": self.optimizer.clip if self.run.zero_stage else 0.0,
            "zero_optimization": {"stage": self.run.zero_stage},
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        }
        if self.run.precision == "bfloat16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}  # an update that is not finite is skipped
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.run.zero_stage == 3:
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if self.run.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            config["zero_force_ds_cpu_optimizer"] = False  # torch's own AdamW where DeepSpeed's for processors is not built
        if self.run.offload == "all":
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
        return config


def _build(kind, values, path: str):
    if not isinstance(values, dict):
        raise RecipeError(f"{path or 'the recipe'} is {values!r}; expected keys and values")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.3)
            hint = f"did you mean {path}{close[0]}?" if close else f"valid ones are {', '.join(fields)}"
            raise RecipeError(f"unknown key {path}{key}; {hint}")
    missing = [name for name, item in fields.items() if name not in values and item.default is dataclasses.MISSING
               and item.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing:
        raise RecipeError(f"missing key {path}{missing[0]}; the recipe needs it")
    built = {}
    for key, value in values.items():
        section = SECTIONS.get(key) if kind is Recipe else None
        if section and (value is not None or fields[key].default is not None):
            value = _build(section, value, f"{path}{key}.")
        elif section:
            pass  # a section that may be left out
        elif kind is Parts and isinstance(value, dict):
            value = _build(Part, value, f"{path}{key}.")
        elif kind is Data and key in ("sources", "heldout"):
            if not isinstance(value, list):
                raise RecipeError(f"{path}{key} is {value!r}; expected a list of {{shards: FOLDER}}")
            value = tuple(_build(Source, item, f"{path}{key}.{number}.") for number, item in enumerate(value))
        elif kind is Lora and key == "targets" and value is not None:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise RecipeError(f"{path}{key} is {value!r}; expected a list of layer names, or null")
            value = tuple(value)
        else:
            value = _checked(fields[key].type, value, f"{path}{key}")
        built[key] = value
    return kind(**built)


def _checked(kind, value, path: str):
    """A scalar of the field's type; YAML reads 1e-4 as text, so numbers may come as text."""
    allowed = [part.strip() for part in str(getattr(kind, "__name__", kind) if isinstance(kind, type) else kind).split("|")]
    allowed = ["{rate: ...}" if part.endswith(".Part") else part for part in allowed]
    if value is None and "None" in allowed:
        return None
    try:
        if "bool" in allowed and isinstance(value, bool):
            return value
        if "int" in allowed and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if "float" in allowed and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    if "str" in allowed and isinstance(value, str | int | float):
        return str(value)
    raise RecipeError(f"{path} is {value!r}; expected {' or '.join(allowed)}")


class _OneValueLoader(yaml.SafeLoader):
    """yaml.safe_load takes the last of two equal keys and says nothing; here that is an error."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in keys and key.tag != "tag:yaml.org,2002:merge":
                raise RecipeError(f"the key {name} stands twice in a section, again on line {key.start_mark.line + 1}; keep one of them")
            keys.add(name)
        return super().construct_mapping(node, deep)


def _parsed(text: str):
    return yaml.load(text, Loader=_OneValueLoader)  # noqa: S506 (a SafeLoader)


def _override(values: dict, text: str) -> None:
    path, found, value = text.partition("=")
    if not found:
        raise RecipeError(f"{text!r} is no override; expected key=value, such as run.steps=100")
    *parents, last = path.split(".")
    place = values
    for depth, key in enumerate([*parents, last]):
        if isinstance(place, list) and not (key.isdigit() and int(key) < len(place)):
            raise RecipeError(f"unknown key {path}; {'.'.join(parents[:depth])} is a list of {len(place)}, counted from 0; give a number")
        if not isinstance(place, list | dict):
            whole = ".".join(parents[:depth])
            raise RecipeError(f"unknown key {path}; {whole} is {place!r}, a single value; give all its keys: {whole}={{{key}: ..., ...}}")
        key = int(key) if isinstance(place, list) else key
        if depth == len(parents):
            place[key] = _parsed(value)
        else:
            if isinstance(place, dict) and place.get(key) is None:  # absent, or null
                place[key] = {}
            place = place[key]


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b=c` overrides (values parsed as YAML; list items by number, `data.sources.0.shards=DIR`).

    Raises FileNotFoundError, or RecipeError naming the key and the nearest valid one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; recipes that come with the toolkit are in train_vlm/recipes/")
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds {type(values).__name__}; expected keys and values")
    try:
        for override in overrides:
            _override(values, override)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r} is no valid YAML value") from error
    return _build(Recipe, values, "")
