"""Do the adapters of mamba-ssm's Triton kernels hold? The installed kernels' own code, run by Triton's interpreter on a processor.

    pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm && tar xf mamba_ssm-*.tar.gz
    python benchmarks/interpreted_kernels.py --source mamba_ssm-*/        writes benchmarks/results/interpreted_kernels.{md,json}

The probes of vlm/decoder/kernels.py and step_kernel.py, which an installed kernel has to pass on a GPU before it is used: shapes, strides,
numbering of segments, states, gradients, against the float64 recurrence. Only the arithmetic of tiles is numpy's here. bfloat16 is left
out, whose products the interpreter gets wrong, and so is speed. Some three minutes. Exit code 1 when a probe fails.
"""

import argparse
import contextlib
import os
import platform
import sys
import time
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from result_files import write_results  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

from vlm.decoder import kernels, step_kernel  # noqa: E402

CPU = torch.device("cpu")


def _first_configuration(self, *args, **settings):
    """Autotuning times every configuration on a GPU; any of them has to be right."""
    self.best_config = chosen = self.configs[0]
    if chosen.pre_hook is not None:
        chosen.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **settings, **chosen.all_kwargs()})
    return self.fn.run(*args, **settings, **chosen.all_kwargs())


def open_package(source: Path) -> str:
    """Make `import mamba_ssm.ops.triton...` find the kernels of a source folder without its CUDA extension; returns its version."""
    if not (source / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py").is_file():
        raise SystemExit(f"no mamba_ssm/ops/triton/ssd_combined.py in {source}; expected an unpacked source distribution of mamba-ssm")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module = types.ModuleType(name)
        module.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = module
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=4)
    Autotuner.run = _first_configuration
    text = (source / "mamba_ssm" / "__init__.py").read_text(encoding="utf-8")
    return next(line.split("=")[1].strip(" \"'") for line in text.splitlines() if line.startswith("__version__"))


def page(result: dict) -> str:
    lines = [
        "# mamba-ssm's Triton kernels through our adapters, interpreted",
        "",
        f"mamba-ssm {result['mamba_ssm']}, triton {result['triton']} (its interpreter), torch {result['torch']}, {result['machine']}.",
        "",
        "| kernel | what | found | holds |",
        "|---|---|---|---|",
        *(f"| {row['kernel']} | {row['what']} | {row['figure']} | {'yes' if row['holds'] else 'NO'} |" for row in result["rows"]),
    ]
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder that holds mamba_ssm/")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "interpreted_kernels")
    options = parser.parse_args()
    version, rows, begun = open_package(options.source), [], time.monotonic()
    probes = [("selective_state_update", lambda: step_kernel.step_findings(step_kernel._triton_step, CPU))]
    probes += [
        ("mamba_chunk_scan_combined", lambda dtype=dtype: kernels.findings(kernels._triton, CPU, dtype))
        for dtype in (torch.float32, torch.float16)
    ]
    for kernel, probe in probes:
        found = probe()
        rows += [{"kernel": kernel, "what": what, "figure": figure, "holds": holds} for what, figure, holds in found]
        print(f"{kernel}: {sum(holds for *_, holds in found)} of {len(found)} hold, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    result = {
        "command": f"python benchmarks/interpreted_kernels.py --source mamba_ssm-{version}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__, "triton": triton.__version__, "mamba_ssm": version, "rows": rows,
    }  # fmt: skip
    write_results(options.out, result, page(result))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
