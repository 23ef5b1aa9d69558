"""python -m vlm.doctor [--model DIR] [--json]: one line a check, exit 1 when one fails, 2 when the model cannot be opened."""

import argparse
import json
import sys

import torch

from ..checkpoint import load_model
from ..device import default_device
from .check import BOUNDS
from .examination import examine, small_model

__all__ = ["main"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm.doctor", description="Check a model on this machine, numerically.")
    parser.add_argument("--model", metavar="DIR", help="a model folder; without it a tiny model is made on the spot")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device or default_device())
        dtype = DTYPES.get(options.dtype)
        if options.model:
            model, processor = load_model(options.model, dtype=dtype, device=device)
        else:
            model, processor = small_model()
            model = model.to(device=device, dtype=dtype or model.dtype)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"doctor: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
    checks = []
    for check in examine(model, processor, options.model):
        checks.append(check)
        if not options.json:
            print(check.line(), flush=True)
    failed = sum(not check.ok for check in checks)
    if options.json:
        rows = [{"name": check.name, "figure": check.figure, "ok": check.ok} for check in checks]
        print(json.dumps({"model": options.model, "device": str(device), "dtype": str(model.dtype), "checks": rows, "failed": failed}))
    else:
        print(f"{len(checks)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
