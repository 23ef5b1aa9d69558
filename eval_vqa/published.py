"""Scores others have published, each with the split it is of and whether that task was trained on: without both it means nothing.

VizWiz with its train split (73 to 79) and without (50 to 64) are not comparable; nor are test-dev and val of VQAv2.
"""

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True)
class Published:
    """score in percent; split as published; trained: what is known of training on the task's own train split."""

    model: str
    score: float
    split: str
    trained: str


SEEN = "train split in the training mix"
UNSEEN = "not trained on it"
UNKNOWN = "training not stated here"
PUBLISHED: dict[str, list[Published]] = {
    "vqav2": [
        Published("LLaVA-1.5 7B", 78.5, "test-dev", SEEN), Published("LLaVA-1.5 13B", 80.0, "test-dev", SEEN),
        Published("LLaVA-1.6 13B", 82.8, "test-dev", SEEN), Published("LLaVA-1.6 34B", 83.7, "test-dev", SEEN),
        Published("Eagle-X4 13B", 83.8, "test-dev", UNKNOWN), Published("NVILA 8B", 85.4, "test-dev", UNKNOWN),
        Published("NVLM-D 34B", 84.3, "test-dev", UNKNOWN), Published("NVLM-D 72B", 85.4, "test-dev", UNKNOWN),
        Published("PaliGemma 2 10B", 85.8, "minival", "fine-tuned on this task"),
    ],
    "gqa": [
        Published("LLaVA-1.5 7B", 62.0, "testdev_balanced", SEEN), Published("LLaVA-1.5 13B", 63.3, "testdev_balanced", SEEN),
        Published("LLaVA-1.6 13B", 65.4, "testdev_balanced", SEEN), Published("LLaVA-1.6 34B", 67.1, "testdev_balanced", SEEN),
        Published("Eagle-X4 13B", 66.3, "testdev_balanced", UNKNOWN),
        Published("PaliGemma 2 10B", 68.3, "testdev_balanced", "fine-tuned on this task"),
    ],
    "vizwiz": [
        Published("LLaVA-1.5 7B", 50.0, "test", UNSEEN), Published("LLaVA-1.5 13B", 53.6, "test", UNSEEN),
        Published("LLaVA-1.6 13B", 60.5, "test", UNSEEN), Published("LLaVA-1.6 34B", 63.8, "test", UNSEEN),
        Published("Eagle-X4 13B", 56.2, "test", UNKNOWN), Published("PaliGemma 2 10B", 78.6, "val", "fine-tuned on this task"),
    ],
}  # fmt: skip
