"""What a start of a run finds: nothing, its own checkpoint to go on from, its own finished model, or what another recipe left.

The same command is given again after a kill, so the command cannot say which it is; the folders do. What belongs to another recipe is never
overwritten in silence: the run is refused with the keys that differ, or told to by `run.replace`.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from train_vlm.adapters import adapter_folder
from train_vlm.checkpointing import newest_checkpoint
from train_vlm.recipe import Recipe
from train_vlm.run_identity import difference
from vlm.files import write_whole

__all__ = ["SavePlan", "Standing", "Start", "checkpoint_content", "checkpoints_of", "look_for_start", "mark_finished"]

MARKER = "training.json"
COST_SHARE = 0.02  # saving by the clock takes at most this share of the time,
MOST_STRETCH = 4  # but comes no more than so many times as rarely as asked: what a kill costs is the time since


@dataclass
class Standing:
    """Where a run stands: optimizer steps made, the smoothed loss, seconds of training (pauses between starts left out) and of waiting for
    data, how often it was started, the perplexity of the recipe's text before the first step, layers that were put back from FP8, and how
    many packs were longer than data.pack_tokens."""

    step: int = 0
    smooth_loss: float | None = None
    spent_seconds: float = 0.0
    waiting_seconds: float = 0.0
    starts: int = 1
    text_perplexity: float | None = None
    fp8_put_back: list[str] = field(default_factory=list)
    long_packs: int = 0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Start:
    """is_finished: the model is there already. checkpoint: the folder to go on from, written by `ranks` ranks, with what stood in it."""

    is_finished: bool = False
    checkpoint: Path | None = None
    ranks: int = 0
    standing: Standing | None = None
    ledger: dict | None = None


def checkpoints_of(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".checkpoints")


def _length(recipe: Recipe) -> dict:
    return {"steps": recipe.run.steps, "minutes": recipe.run.minutes}


def _marker(out: Path) -> dict | None:
    try:
        return json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_past_end(standing: Standing, recipe: Recipe) -> bool:
    if recipe.run.steps is not None:
        return standing.step > recipe.run.steps
    return standing.spent_seconds >= 60.0 * recipe.run.minutes


def look_for_start(recipe: Recipe, described: dict) -> Start:
    """Decide how a run begins (`described`: see run_identity). Called by one rank; may put damaged checkpoints aside and, with
    `run.replace`, removes those of another recipe, and its adapters.

    Raises ValueError when `out` or its checkpoints belong to another recipe, or are further than the recipe goes.
    """
    out, folder = Path(recipe.out), checkpoints_of(recipe.out)
    has_out = out.is_dir() and any(out.iterdir())
    marker = _marker(out) if has_out else None
    if marker and marker.get("run") == described and marker.get("length") == _length(recipe):
        return Start(is_finished=True)
    found = newest_checkpoint(folder) if folder.is_dir() else None
    reason = None
    if found:
        checkpoint, manifest = found
        state = manifest["standing"]
        standing = Standing(**state["standing"])
        if differing := difference(state["run"], described):
            reason = f"{checkpoint} is of another recipe: {'; '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}"
        elif state["length"] != _length(recipe) and _is_past_end(standing, recipe):
            minutes = standing.spent_seconds / 60
            reason = f"{checkpoint} is at step {standing.step}, after {minutes:.1f} minutes: past the end of this recipe"
        else:
            return Start(False, checkpoint, manifest["ranks"], standing, state["ledger"])
    elif has_out:
        differing = difference(marker["run"], described) if marker and isinstance(marker.get("run"), dict) else []
        reason = f"{out} exists already" + (f", of another recipe: {'; '.join(differing[:3])}" if differing else "")
    if reason is None:
        return Start()
    if not recipe.run.replace:
        raise ValueError(f"{reason}; give another out, remove {out} and {folder.name}, or start over with run.replace=true")
    print(f"{reason}; starting over (run.replace)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(adapter_folder(out), ignore_errors=True)  # of another model: a run without adapters would leave it beside its own
    return Start()


def mark_finished(recipe: Recipe, described: dict, standing: Standing, ledger: dict) -> None:
    """Beside the weights: which run made them, so that the same command has nothing to do and another one is refused."""
    content = {"run": described, "length": _length(recipe), "standing": standing.to_dict(), "ledger": ledger}
    write_whole(Path(recipe.out) / MARKER, json.dumps(content, indent=1))


def checkpoint_content(recipe: Recipe, described: dict, standing: Standing, ledger: dict) -> dict:
    """What `look_for_start` reads back."""
    return {"run": described, "length": _length(recipe), "standing": standing.to_dict(), "ledger": ledger}


class SavePlan:
    """When to save: every so many steps, or by the clock, and then not so often that saving costs over COST_SHARE of the time, within
    MOST_STRETCH."""

    def __init__(self, every_steps: int | None, every_minutes: float | None, *, last_step: int, now: float):
        self.every_steps, self.every_seconds = every_steps, None if every_minutes is None else 60.0 * every_minutes
        self.last_step, self.last, self.cost = last_step, now, 0.0

    @property
    def is_on(self) -> bool:
        return self.every_steps is not None or self.every_seconds is not None

    def is_due(self, step: int, now: float) -> bool:
        """Asked after a step, by rank 0."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return self.every_seconds is not None and now - self.last >= self.stretch

    @property
    def stretch(self) -> float:
        """Seconds between two saves by the clock."""
        return max(self.every_seconds, min(self.cost / COST_SHARE, MOST_STRETCH * self.every_seconds))

    def saved(self, step: int, began: float, ended: float) -> str | None:
        """Note a save; what there is to tell: that the next ones come more rarely than was asked."""
        before = None if self.every_seconds is None else self.stretch
        self.last_step, self.last, self.cost = step, ended, ended - began
        if before is None or self.stretch <= max(before, 1.01 * self.every_seconds):
            return None
        return f"a checkpoint takes {self.cost:.0f} s: the next comes in {self.stretch / 60:.0f} min, not {self.every_seconds / 60:.0f}"
