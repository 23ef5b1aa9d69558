"""What the two training programs share: the command line, and errors as one clear line."""

import argparse
import atexit
import contextlib
import dataclasses
import os
import sys
import traceback
import warnings
from typing import NoReturn

import torch
import yaml

from train_vlm.recipe import RecipeError, load_recipe

__all__ = ["program", "run_program"]


def _plain(value):
    """Tuples as lists, which is what a recipe has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _tell(stage: str, what: object) -> None:
    """A line to standard error in one write: print() can make two of it, and another rank's line comes between."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.write(f"{stage}: {what}\n")


def program(stage: str, description: str) -> NoReturn:
    """What a training program does, and its end: everything in order, then the process at once. The lock on the folder goes last, with the
    ranks' meeting point; Python would take another second or two to clear up, in which the next run's ranks could meet here."""
    held = contextlib.ExitStack()
    code = run_program(stage, description, held=held)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    held.close()
    os._exit(code)


def run_program(stage: str, description: str, arguments: list[str] | None = None, *, held: contextlib.ExitStack | None = None) -> int:
    """Parse, check, train; `held`: see `train`. Returns the exit code: 0; 2 for a wrong recipe or input; 3 for a run that failed; 4 for one
    that was asked to end, and goes on with the same command; 130 for Ctrl-C before its first step, and for one that was asked to end and
    saves nothing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML recipe")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what it takes (parameters, memory, time), and stop"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override of a recipe key, such as run.steps=100")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore", module="deepspeed")
    from train_vlm.ranks import end_ranks

    code = 1
    try:
        code = _run(stage, options, held)
    except KeyboardInterrupt:
        _tell(stage, "interrupted")
        code = 130
    except Exception:  # said here, for a rank of several may not come back from its end
        traceback.print_exc()
        code = 1
    finally:
        end_ranks(code)
    return code


def _run(stage: str, options: argparse.Namespace, held: contextlib.ExitStack | None) -> int:
    """Exit code of a run; other errors than those expected are the caller's."""
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if recipe.stage != stage:
            raise RecipeError(f"the recipe's stage is {recipe.stage}; this program runs stage {stage} (use train_vlm/{recipe.stage}.py)")
        if options.dry_run:
            print(yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False))
            from train_vlm.planning import plan_text

            print(plan_text(recipe))
            return 0
        from train_vlm.ranks import FailedElsewhereError
        from train_vlm.stopping import AskedToStop
        from train_vlm.trainer import train

        try:
            train(recipe, held)
        except FailedElsewhereError:
            return 2
        except AskedToStop as asked:
            return 4 if asked.is_saved else 130
        return 0
    except (ValueError, OSError, ImportError) as error:
        _tell(stage, error)
        return 2
    except torch.distributed.DistError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _tell(stage, f"the ranks cannot meet: {reason}; is the port in use? deepspeed --master_port N gives another")
        return 2
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        _tell(stage, error)
        return 3
