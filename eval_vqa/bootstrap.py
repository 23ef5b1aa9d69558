"""How sure a difference between two runs is: a paired bootstrap over images.

Both runs answered the same questions, so differences are resampled, not scores. Questions about one picture share its difficulty; whole
pictures are therefore drawn, with all their questions. GQA has thirty questions an image: drawing single questions would call noise a gain.
"""

import random
from collections.abc import Sequence

__all__ = ["paired_interval", "paired_interval_slow"]


def paired_interval(
    differences: Sequence[float], images: Sequence, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of `differences` (any unit) by the percentile method, pictures drawn with replacement.

    images: the picture of each question. Raises ValueError without questions or with fewer than one resample.
    """
    import numpy

    sums, counts = _per_image(differences, images, resamples)
    generator = numpy.random.default_rng(seed)
    sums, counts = numpy.array(sums), numpy.array(counts, dtype=float)
    means = numpy.empty(resamples)
    for number in range(resamples):
        drawn = generator.integers(0, len(sums), len(sums))
        means[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = numpy.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_interval_slow(differences, images, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """The same without numpy, draw by draw: the reference for tests (another stream of random numbers, the same distribution)."""
    sums, counts = _per_image(differences, images, resamples)
    generator = random.Random(seed)
    means = []
    for _ in range(resamples):
        drawn = [generator.randrange(len(sums)) for _ in sums]
        means.append(sum(sums[one] for one in drawn) / sum(counts[one] for one in drawn))
    means.sort()
    edge = (1 - confidence) / 2
    return means[round(edge * (resamples - 1))], means[round((1 - edge) * (resamples - 1))]


def _per_image(differences, images, resamples: int) -> tuple[list[float], list[int]]:
    if len(differences) != len(images) or not differences:
        raise ValueError(f"expected one picture a difference and at least one, found {len(differences)} and {len(images)}")
    if resamples < 1:
        raise ValueError(f"expected at least one resample, found {resamples}")
    sums: dict = {}
    counts: dict = {}
    for difference, image in zip(differences, images, strict=True):
        sums[image] = sums.get(image, 0.0) + difference
        counts[image] = counts.get(image, 0) + 1
    return list(sums.values()), list(counts.values())
