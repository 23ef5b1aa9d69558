"""The sections of a recipe: frozen dataclasses that check themselves, each key with its meaning and unit.

A wrong value dies here, with the key's name, before a model is touched. How the sections come from a file is in recipe.py.
"""

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["Data", "Lora", "Optimizer", "Part", "Parts", "RecipeError", "Run", "Source"]


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
        if not 0 < self.weight < math.inf:
            raise RecipeError(f"data.sources.weight is {self.weight}; expected more than 0, and a finite number")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise RecipeError(f"data.sources.max_tiles is {self.max_tiles}; expected at least 1, or null for the model's own limit")


@dataclass(frozen=True)
class Data:
    """sources: what is mixed; heldout: sources whose loss is measured and not trained on, heldout_samples: how many of their samples;
    heldout_text: a plain text file whose perplexity is told before the first and after the last step (is the language kept?);
    batch_samples: samples of one optimizer step over all ranks and micro-batches; micro_batches: forward passes
    of a rank per step; pack_tokens: longest pack (one forward pass of a rank), in tokens: micro_batches then grows until the packs of the
    run fit; max_tokens: longest sample, in tokens; workers: reading processes per rank; max_skipped_percent: unusable samples
    (broken, missing, too long, nothing supervised) among those seen, above which the run stops."""

    sources: tuple[Source, ...]
    heldout: tuple[Source, ...] = ()
    heldout_samples: int = 256
    heldout_text: str | None = None
    batch_samples: int = 32
    micro_batches: int = 1
    pack_tokens: int | None = None
    max_tokens: int = 4096
    workers: int = 1
    max_skipped_percent: float = 1.0

    def __post_init__(self):
        if not self.sources:
            raise RecipeError("data.sources is empty; expected at least one {shards: FOLDER}")
        for name in ("batch_samples", "micro_batches", "max_tokens", "heldout_samples"):
            if getattr(self, name) < 1:
                raise RecipeError(f"data.{name} is {getattr(self, name)}; expected at least 1")
        if self.pack_tokens is not None and self.pack_tokens < self.max_tokens:
            raise RecipeError(f"data.pack_tokens is {self.pack_tokens}; expected at least data.max_tokens ({self.max_tokens})")
        if self.workers < 0 or not self.max_skipped_percent >= 0:
            raise RecipeError(f"data.workers is {self.workers} and max_skipped_percent {self.max_skipped_percent}; expected 0 or more")


@dataclass(frozen=True)
class Part:
    """rate: peak learning rate; weight_decay: of its matrices (null: the optimizer's); warmup: share of all steps with a rising rate (null:
    the optimizer's); blocks: of last_encoder_blocks only, how many of the encoder's blocks, counted from its end."""

    rate: float
    weight_decay: float | None = None
    warmup: float | None = None
    blocks: int | None = None

    def __post_init__(self):
        if not self.rate > 0:
            raise RecipeError(f"parts: a rate is {self.rate}; expected a learning rate above 0, or null in place of the part to freeze it")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise RecipeError(f"parts: a weight_decay is {self.weight_decay}; expected 0 or more")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise RecipeError(f"parts: a warmup is {self.warmup}; expected a share between 0 and 1")
        if self.blocks is not None and self.blocks < 1:
            raise RecipeError(f"parts: blocks is {self.blocks}; expected at least 1")


@dataclass(frozen=True)
class Parts:
    """What trains: a peak learning rate, or {rate, weight_decay, warmup}; null freezes. last_encoder_blocks ({rate, blocks, ...}): the last
    blocks of the vision encoder and what comes after them; vision_encoder is then the rest."""

    vision_encoder: float | Part | None = None
    last_encoder_blocks: Part | None = None
    projector: float | Part | None = 1e-4
    language_model: float | Part | None = None

    def __post_init__(self):
        if not self.trained:
            raise RecipeError("parts: every part is frozen; give at least one a learning rate")
        for name in self.names():
            value = getattr(self, name)
            if value is not None and not isinstance(value, Part) and not value > 0:
                raise RecipeError(f"parts.{name} is {value}; expected a learning rate above 0, or null to freeze")
            if isinstance(value, Part) and (value.blocks is not None) != (name == "last_encoder_blocks"):
                raise RecipeError(f"parts.{name}.blocks is {value.blocks}; it belongs to last_encoder_blocks, which needs it")

    @classmethod
    def names(cls) -> list[str]:
        return [item.name for item in dataclasses.fields(cls)]

    @property
    def trained(self) -> dict[str, Part]:
        """The parts that train, each with its settings."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value if isinstance(value, Part) else Part(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Lora:
    """Adapters on the decoder, whose own weights are then frozen; parts.language_model is their rate. rank, alpha, dropout: peft's.
    targets: names of layers (in_proj, out_proj, q_proj, ... or longer; null: every projection). merge: OUT has the adapters in its weights,
    a plain model; without it OUT has the decoder as it was, for vlm.lora.load_adapter. OUT.adapter holds them alone either way."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    merge: bool = True

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise RecipeError(
                f"lora has rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; expected rank >= 1, alpha > 0, dropout in [0, 1)"
            )
        if self.targets is not None and not self.targets:
            raise RecipeError("lora.targets is empty; expected names of layers, or null for every projection")


@dataclass(frozen=True)
class Optimizer:
    """kind: adamw, or muon (matrices by Muon, the rest by AdamW; needs ZeRO stage 0 and float32; `muon_rate` is the peak rate of a matrix
    relative to its part's). The calendar: warmup: share of all steps with a rising rate; final: where the cosine ends, as a share of the
    peak (the last step is one step before it); weight_decay: matrices only; clip: largest gradient norm."""

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
    """steps: optimizer steps; or minutes: training time, after which the run is at its final rate and ends (give one of the two).
    zero_stage: DeepSpeed ZeRO 0..3; precision: float32 or bfloat16; log_every: steps. activation_checkpointing: of the decoder, and
    encoder_activation_checkpointing: of the vision encoder, keep block inputs only and compute the blocks again in the backward pass.
    offload: what lies in the machine's memory in place of the card's: optimizer (its states and float32 weights; ZeRO 1 to 3), or all (the
    weights, too; ZeRO 3).
    heldout_every: steps between two looks at the held-out loss (null: at the end only, when there are held-out sources).
    wandb: project of Weights & Biases to report to; peak_teraflops: of one device, for the MFU (null: that of `precision`, known by the
    device's name or measured, also for a run with FP8 layers).

    Checkpoints to resume from, in OUT.checkpoints: save_every_steps: steps; save_every_minutes: minutes, made rarer when saving costs over
    2 % of the time (null for both: none are written); keep: how many of the newest stay. replace: start over what another recipe left in
    OUT and OUT.checkpoints (without it, such a run is refused).
    """

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    zero_stage: int = 1
    offload: str | None = None
    precision: str = "float32"
    activation_checkpointing: bool = False
    encoder_activation_checkpointing: bool = False
    log_every: int = 5
    heldout_every: int | None = None
    wandb: str | None = None
    peak_teraflops: float | None = None
    threads_per_rank: int | None = None
    save_every_steps: int | None = None
    save_every_minutes: float | None = 1.0
    keep: int = 2
    replace: bool = False

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise RecipeError(f"run.steps is {self.steps} and run.minutes {self.minutes}; give exactly one of them")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and not self.minutes > 0):
            raise RecipeError(f"run.steps is {self.steps} and run.minutes {self.minutes}; expected more than 0")
        for name in ("log_every", "heldout_every", "threads_per_rank", "save_every_steps", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RecipeError(f"run.{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"run.seed is {self.seed}; expected 0 to 2**63 - 1")
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            raise RecipeError(f"run.save_every_minutes is {self.save_every_minutes}; expected more than 0, or null for none")
        if self.peak_teraflops is not None and not self.peak_teraflops > 0:
            raise RecipeError(f"run.peak_teraflops is {self.peak_teraflops}; expected more than 0")
        if self.zero_stage not in (0, 1, 2, 3):
            raise RecipeError(f"run.zero_stage is {self.zero_stage}; expected 0, 1, 2 or 3")
        if self.offload not in (None, "optimizer", "all"):
            raise RecipeError(f"run.offload is {self.offload!r}; expected optimizer, all, or null")
        if self.offload and self.zero_stage < (3 if self.offload == "all" else 1):
            stages = "3" if self.offload == "all" else "1 to 3"
            raise RecipeError(f"run.offload is {self.offload} with run.zero_stage {self.zero_stage}; expected stage {stages}")
        if self.precision not in ("float32", "bfloat16"):
            raise RecipeError(f"run.precision is {self.precision!r}; expected float32 or bfloat16")
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise RecipeError("run.zero_stage 0 with bfloat16 starts Adam's step counter at 1 in DeepSpeed; use stage 1 or higher")
