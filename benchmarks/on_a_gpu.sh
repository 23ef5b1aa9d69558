#!/usr/bin/env bash
# Everything of this project that wants a GPU, in order of what must be known first; some ten minutes on one H100.
#
#     bash benchmarks/on_a_gpu.sh [FOLDER]       logs and results go to FOLDER (default: benchmarks/results/gpu)
#
# PYTHON names the interpreter. Every step has its own limit and log; one that fails or runs out of time does not stop the next ones.
# Exit code: 2 without a GPU, else the number of steps that failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 PYTHONPATH=. DS_ACCELERATOR=cpu
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU that torch can use: nothing of this can run here" >&2
    exit 2
fi
failed=0

step() {
    local name=$1 limit=$2
    shift 2
    local begun=$SECONDS
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    [ $code -ne 0 ] && failed=$((failed + 1))
    echo "$name: exit code $code, $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
}

"$PYTHON" -c 'import platform, torch, transformers; print(torch.cuda.get_device_name(), "python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)' | tee "$out/summary.txt"
step tests 180 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider
step doctor-float32 60 "$PYTHON" -m vlm.doctor --device cuda
step captured-steps 150 "$PYTHON" benchmarks/captured_steps.py --out "$out/captured_steps"
step decoder 100 "$PYTHON" benchmarks/decoder.py --out "$out/decoder"
step loss 60 "$PYTHON" benchmarks/loss.py --dtype bfloat16 --out "$out/loss"
step fp8 150 "$PYTHON" benchmarks/fp8.py --steps 20 --pictures 60 --out "$out/fp8"
exit $failed
