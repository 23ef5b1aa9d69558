"""How one run trains: a YAML file checked by frozen dataclasses, with overrides `a.b=c` from the command line.

What the model is lives in its folder; where the run happens comes from the launcher. An unknown key stops the run with the nearest valid
name, before any model is touched. The DeepSpeed dictionary is computed from the recipe: nobody writes one by hand.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

__all__ = ["Data", "Optimizer", "Parts", "Recipe", "RecipeError", "Run", "Source", "load_recipe"]


class RecipeError(ValueError):
    """The recipe or an override is wrong; the message names the key and what is valid."""


@dataclass(frozen=True)
class Source:
    """shards: folder of shards; weight: samples taken relative to other sources; max_tiles: limit per image, without the thumbnail (larger
    images are read with fewer tiles); at_most_tiles: samples of more tiles in all are not read (a curriculum; the run says how many)."""

    shards: str
    weight: float = 1.0
    max_tiles: int | None = None
    at_most_tiles: int | None = None

    def __post_init__(self):
        if not self.weight > 0:
            raise RecipeError(f"data.sources.weight is {self.weight}; expected more than 0")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise RecipeError(f"data.sources.max_tiles is {self.max_tiles}; expected at least 1, or null for the model's own limit")


@dataclass(frozen=True)
class Data:
    """sources: what is mixed; batch_samples: samples of one optimizer step over all ranks and micro-batches; micro_batches: forward passes
    of a rank per step; max_tokens: longest sample, in tokens; workers: reading processes per rank; max_skipped_percent: unusable samples
    (broken, missing, too long, nothing supervised) among those seen, above which the run stops."""

    sources: tuple[Source, ...]
    batch_samples: int = 32
    micro_batches: int = 1
    max_tokens: int = 4096
    workers: int = 1
    max_skipped_percent: float = 1.0

    def __post_init__(self):
        if not self.sources:
            raise RecipeError("data.sources is empty; expected at least one {shards: FOLDER}")
        for name in ("batch_samples", "micro_batches", "max_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"data.{name} is {getattr(self, name)}; expected at least 1")
        if self.workers < 0 or not self.max_skipped_percent >= 0:
            raise RecipeError(f"data.workers is {self.workers} and max_skipped_percent {self.max_skipped_percent}; expected 0 or more")


@dataclass(frozen=True)
class Parts:
    """Peak learning rate of each part; null freezes it."""

    vision_encoder: float | None = None
    projector: float | None = 1e-4
    language_model: float | None = None

    def __post_init__(self):
        if all(rate is None for rate in dataclasses.astuple(self)):
            raise RecipeError("parts: every part is frozen; give at least one a learning rate")
        for name, rate in dataclasses.asdict(self).items():
            if rate is not None and not rate > 0:
                raise RecipeError(f"parts.{name} is {rate}; expected a learning rate above 0, or null to freeze")


@dataclass(frozen=True)
class Optimizer:
    """kind: adamw, or muon (matrices by Muon, the rest by AdamW; needs ZeRO stage 0 and float32; `muon_rate` is the peak rate of a matrix
    relative to its part's). The calendar: warmup: share of all steps with a rising rate; final: last rate as a share of the peak (cosine);
    weight_decay: matrices only; clip: largest gradient norm."""

    kind: str = "adamw"
    muon_rate: float = 2.5
    warmup: float = 0.03
    final: float = 0.1
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0

    def __post_init__(self):
        if self.kind not in ("adamw", "muon"):
            raise RecipeError(f"optimizer.kind is {self.kind!r}; expected adamw or muon")
        if not 0 <= self.warmup < 1 or not 0 <= self.final <= 1:
            raise RecipeError(f"optimizer.warmup is {self.warmup} and optimizer.final {self.final}; expected shares between 0 and 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0 and self.clip > 0):
            raise RecipeError(
                f"optimizer has beta1 {self.beta1}, beta2 {self.beta2}, weight_decay {self.weight_decay}, clip {self.clip}; expected "
                "betas in "
                "[0, 1), weight_decay of 0 or more, clip above 0"
            )


@dataclass(frozen=True)
class Run:
    """steps: optimizer steps; or minutes: training time, from which the steps are set after the first ones are timed (give one of the two).
    zero_stage: DeepSpeed ZeRO 0..3; precision: float32 or bfloat16; activation_checkpointing: keep block inputs only; log_every: steps."""

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    zero_stage: int = 1
    precision: str = "float32"
    activation_checkpointing: bool = False
    log_every: int = 5
    threads_per_rank: int | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise RecipeError(f"run.steps is {self.steps} and run.minutes {self.minutes}; give exactly one of them")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and not self.minutes > 0):
            raise RecipeError(f"run.steps is {self.steps} and run.minutes {self.minutes}; expected more than 0")
        for name in ("log_every", "threads_per_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RecipeError(f"run.{name} is {getattr(self, name)}; expected at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise RecipeError(f"run.zero_stage is {self.zero_stage}; expected 0, 1, 2 or 3")
        if self.precision not in ("float32", "bfloat16"):
            raise RecipeError(f"run.precision is {self.precision!r}; expected float32 or bfloat16")
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise RecipeError("run.zero_stage 0 with bfloat16 starts Adam's step counter at 1 in DeepSpeed; use stage 1 or higher")


@dataclass(frozen=True)
class Recipe:
    """One run: stage (align or sft), the model folder to start from, the folder to write, and the four sections."""

    stage: str
    model: str
    out: str
    data: Data
    parts: Parts
    run: Run
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        if self.optimizer.kind == "muon" and (self.run.zero_stage, self.run.precision) != (0, "float32"):
            raise RecipeError("optimizer.kind muon needs whole float32 matrices: set run.zero_stage to 0 and run.precision to float32")
        if self.stage not in ("align", "sft"):
            raise RecipeError(f"stage is {self.stage!r}; expected align or sft")
        if self.stage == "align" and (self.parts.language_model is not None or self.parts.projector is None):
            raise RecipeError("stage align trains the projector with a frozen language model; for other parts use stage sft")

    def deepspeed_config(self, world_size: int) -> dict:
        """The dictionary DeepSpeed takes. Raises RecipeError when the batch does not divide."""
        share = world_size * self.data.micro_batches
        if self.data.batch_samples % share:
            raise RecipeError(
                f"data.batch_samples is {self.data.batch_samples}; expected a multiple of ranks x micro_batches "
                f"= {world_size} x {self.data.micro_batches}"
            )
        config = {
            # A micro-batch is one packed row; how many samples it holds is ours to know.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.data.micro_batches,
            "gradient_clipping": self.optimizer.clip,
            "zero_optimization": {"stage": self.run.zero_stage},
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        }
        if self.run.precision == "bfloat16":
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.run.zero_stage == 3:
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
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
        section = {"data": Data, "parts": Parts, "run": Run, "optimizer": Optimizer}.get(key) if kind is Recipe else None
        if section:
            value = _build(section, value, f"{path}{key}.")
        elif kind is Data and key == "sources":
            if not isinstance(value, list):
                raise RecipeError(f"{path}sources is {value!r}; expected a list of {{shards: FOLDER}}")
            value = tuple(_build(Source, item, f"{path}sources.{number}.") for number, item in enumerate(value))
        else:
            value = _checked(fields[key].type, value, f"{path}{key}")
        built[key] = value
    return kind(**built)


def _checked(kind, value, path: str):
    """A scalar of the field's type; YAML reads 1e-4 as text, so numbers may come as text."""
    allowed = [part.strip() for part in str(getattr(kind, "__name__", kind) if isinstance(kind, type) else kind).split("|")]
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


def _override(values: dict, text: str) -> None:
    path, found, value = text.partition("=")
    if not found:
        raise RecipeError(f"{text!r} is no override; expected key=value, such as run.steps=100")
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        if isinstance(place, list) and parent.isdigit() and int(parent) < len(place):
            place = place[int(parent)]
        elif isinstance(place, dict):
            place = place.setdefault(parent, {})
        else:
            raise RecipeError(f"unknown key {path}; {parent} is no section")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = yaml.safe_load(value)
    elif isinstance(place, dict):
        place[last] = yaml.safe_load(value)
    else:
        raise RecipeError(f"unknown key {path}; {last} is no key of a list")


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b=c` overrides (values parsed as YAML; list items by number, `data.sources.0.shards=DIR`).

    Raises FileNotFoundError, or RecipeError naming the key and the nearest valid one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; recipes that come with the toolkit are in train_vlm/recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
