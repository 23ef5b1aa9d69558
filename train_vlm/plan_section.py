"""The `plan` section of a recipe: what --dry-run takes for granted where the model folder or the shards are not there yet.

A recipe for 8 billion parameters is written before anybody has the weights beside the data. Training reads none of this: what a model is
comes from its folder, what a sample is from its shard, and where a run happens from the launcher.
"""

from dataclasses import dataclass

from train_vlm.recipe_sections import RecipeError

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """preset: the decoder, and vision_encoder: the encoder, when recipe.model is no folder yet; samples: of the whole data set; tiles (with
    thumbnails), text_tokens (all but visual tokens and tile tags) and supervised_tokens of an average sample, when there are no shards
    yet; cards: GPUs in all; card: which (flops.py lists them); mfu_percent: share of the card's dense peak that the run will reach;
    network_gb_s: gigabytes a second between one card and those of other machines (400 Gbit/s for each card are 50)."""

    preset: str | None = None
    vision_encoder: str = "internvit"
    samples: int | None = None
    tiles: float = 13.0
    text_tokens: float = 200.0
    supervised_tokens: float = 100.0
    cards: int = 1
    card: str = "H100"
    mfu_percent: float = 40.0
    network_gb_s: float = 50.0

    def __post_init__(self):
        if self.cards < 1 or not 0 < self.mfu_percent <= 100:
            raise RecipeError(f"plan has {self.cards} cards and an MFU of {self.mfu_percent} %; expected at least 1, and 0 to 100 %")
        if self.tiles < 0 or self.text_tokens < 1 or not 0 < self.supervised_tokens <= self.text_tokens:
            raise RecipeError(
                f"plan has {self.tiles} tiles, {self.text_tokens} text tokens and {self.supervised_tokens} supervised ones a sample; "
                "expected 0 or more tiles, at least 1 text token, and no more supervised ones than these"
            )
        if self.network_gb_s <= 0:
            raise RecipeError(f"plan.network_gb_s is {self.network_gb_s}; expected more than 0")
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"plan.samples is {self.samples}; expected at least 1")
