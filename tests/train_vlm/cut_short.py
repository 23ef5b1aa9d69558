"""A training run that ends in the middle of a step, as by kill -9, in a process that lives on."""

import train_vlm.trainer as training_loop
from train_vlm.recipe import Recipe

__all__ = ["Killed", "train_until"]


class Killed(BaseException):
    """Stands for kill -9 where the process has to live on: nothing between it and the last checkpoint may be saved."""


def train_until(recipe: Recipe, step: int) -> None:
    """Start the run, or go on with it, and stop it in the `step`-th step from there."""
    real, calls = training_loop.train_step, []

    def stopped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return real(*arguments, **keywords)

    training_loop.train_step = stopped
    try:
        training_loop.train(recipe)
    except Killed:
        pass
    finally:
        training_loop.train_step = real
