"""Peak memory of assembling a 4B-shaped model from random sharded checkpoints on disk, and of taking its decoder out again.

    python benchmarks/assemble.py                              writes benchmarks/results/assemble.{md,json}
    python benchmarks/assemble.py --preset tiny --folder checkpoints --out result     a quick look

Needs about 20 GB of disk under --folder, which is removed afterwards. The checkpoints have the shapes, names and dtypes of the real ones
(NVIDIA's format, bf16 with A_log, D and dt_bias in float32; InternViT-300M in OpenGVLab's); the values are one random block, repeated. Each
command runs as a process of its own; its peak is `ru_maxrss` from wait4 (pages of mapped files included), and the bound is 1.5 times the
largest input shard plus 2 GB.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def measure(command: list[str]) -> tuple[float, float, str]:
    """Run a command; (seconds, peak GB, its standard output). Raises SystemExit with its error when it fails.

    This process stays small: a child's peak starts at that of the process it was forked from.
    """
    started = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parent, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="4b", help="shape of the decoder")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest input shard")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (a temporary folder)")
    parser.add_argument("--checkpoints", type=Path, help="folder filled by assemble_checkpoints.py before; it stays")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "assemble")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="assemble-", dir=options.folder))
    try:
        result = run(options, folder)
    finally:
        shutil.rmtree(folder)
    from result_files import write_results

    write_results(options.out, result, page(result))


def run(options: argparse.Namespace, folder: Path) -> dict:
    python = sys.executable
    sources = options.checkpoints or folder
    if options.checkpoints is None:
        measure([python, str(HERE / "assemble_checkpoints.py"), options.preset, str(options.shard_gb), str(folder)])
    shards = sorted(path.stat().st_size / 1e9 for path in (sources / "decoder").glob("*.safetensors"))
    bound = 1.5 * shards[-1] + 2.0
    join = [python, "-m", "vlm.assemble", "--language-model", str(sources / "decoder"), "--vision-encoder", "internvit",
            "--vision-checkpoint", str(sources / "encoder"), "--out", str(folder / "model")]  # fmt: skip
    back = [python, "-m", "vlm.assemble", "--model", str(folder / "model"), "--to-language-model", str(folder / "again")]
    idle = measure([python, "-c", "import vlm.assemble"])
    rows, said = [], []
    for name, command in (("join", join), ("take the decoder out", back)):
        seconds, peak, text = measure(command)
        rows.append({"step": name, "seconds": seconds, "peak_gb": peak, "bound_gb": bound, "within": peak <= bound})
        said.append(text.replace(str(folder), "FOLDER"))
    same = all(
        subprocess.run(["cmp", "--silent", path, folder / "again" / path.name]).returncode == 0
        for path in (sources / "decoder").glob("*.safetensors")
    )
    import torch
    import transformers

    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": f"python benchmarks/assemble.py --preset {options.preset} --shard-gb {options.shard_gb:g}",
        "machine": machine | {"transformers": transformers.__version__, "cores": os.cpu_count()},
        "decoder_gb": sum(shards), "shards": len(shards), "largest_shard_gb": shards[-1], "import_only_gb": idle[1],
        "rows": rows, "shards_equal_byte_for_byte": same, "output": said,
    }  # fmt: skip


def page(result: dict) -> str:
    lines = [
        "# Memory of assembling", "", f"`{result['command']}` on {result['machine']}.", "",
        f"Decoder of {result['decoder_gb']:.2f} GB in {result['shards']} shards, the largest {result['largest_shard_gb']:.2f} GB.",
        f"A process that only imports the program peaks at {result['import_only_gb']:.2f} GB.",
        f"Shards taken out again equal those put in, byte for byte: {result['shards_equal_byte_for_byte']}.", "",
        "| step | seconds | peak memory | bound (1.5 x largest shard + 2 GB) | within |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        lines.append(f"| {row['step']} | {row['seconds']:.0f} | {row['peak_gb']:.2f} GB | {row['bound_gb']:.2f} GB | {row['within']} |")
    lines += ["", *("```\n" + text.strip() + "\n```" for text in result["output"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
