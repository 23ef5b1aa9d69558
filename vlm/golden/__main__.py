"""python -m vlm.golden DIR: check a folder's golden pack, all of it; exit 1 when something drifted, 2 when the folder cannot be opened."""

import argparse
import sys

import torch

from ..checkpoint import load_model
from ..device import default_device
from .drift import check
from .pack import open_pack, write

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm.golden", description="Check or renew the golden pack of a model folder.")
    parser.add_argument("folder", metavar="DIR", help="a model folder")
    parser.add_argument("--write", action="store_true", help="make the pack anew from the model as it is now")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device or default_device())
        model, processor = load_model(options.folder, device=device)
        if options.write:
            written = write(model, processor, options.folder)
            entries = open_pack(options.folder)["pictures"]
            print(f"{written}: {len(entries)} pictures, {sum(entry['numbers'] is not None for entry in entries)} of them with logits")
            return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"golden: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
    findings = check(model, processor, options.folder)
    for name, figure, ok in findings:
        print(f"{'ok  ' if ok else 'FAIL'}  {name:<18} {figure}")
    return 0 if all(ok for _, _, ok in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
