"""The section `fp8` of a recipe: whether and how the decoder's products train in FP8, and what the guard tolerates."""

from dataclasses import dataclass

from train_vlm.recipe_sections import RecipeError

__all__ = ["Fp8"]


@dataclass(frozen=True)
class Fp8:
    """enabled: the decoder's linear layers multiply in FP8 (vlm/fp8.py), emulated where no device has FP8 units; skip_first, skip_last: how
    many products at either end, in the order of execution, stay in BF16. guard_every: steps between two measurements of what FP8 costs each
    layer, the first step included (null: never); guard_min_db: a layer whose signal-to-noise is below, in dB, is put back to BF16 (null:
    only told). compile: on FP8 units, fuse the casts by torch.compile; as single kernels they cost about what the products save."""

    enabled: bool = False
    skip_first: int = 4
    skip_last: int = 4
    guard_every: int | None = 200
    guard_min_db: float | None = 10.0
    compile: bool = True

    def __post_init__(self):
        if self.skip_first < 0 or self.skip_last < 0:
            raise RecipeError(f"fp8.skip_first is {self.skip_first} and fp8.skip_last {self.skip_last}; expected 0 or more products")
        if self.guard_every is not None and self.guard_every < 1:
            raise RecipeError(f"fp8.guard_every is {self.guard_every}; expected at least 1 step, or null for no guard")
        if self.guard_min_db is not None and not self.guard_min_db > 0:
            raise RecipeError(f"fp8.guard_min_db is {self.guard_min_db}; expected more than 0 dB, or null to put no layer back")
