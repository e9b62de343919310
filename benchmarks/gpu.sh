#!/usr/bin/env bash
# All that needs a GPU, in one call: the tests, then the benchmarks. Results go to $1 (gpu_results).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU: nothing to run"'
nvidia-smi > "$out/gpu.txt"
"$python" -m pytest tests/gpu -q | tee "$out/tests.txt"
for kind in patch unet; do
  "$python" benchmarks/step.py step --kind $kind --sizes 256 --batches 4,16 --turns 10 --compiled \
    --picture "$out/step_$kind.png" | tee "$out/step_$kind.md"
done
"$python" benchmarks/step.py step --sizes 512 --batches 4 --turns 5 --picture "$out/step_512.png" \
  | tee "$out/step_512.md"
"$python" benchmarks/step.py noise | tee "$out/noise.md"
"$python" benchmarks/animate.py network --frames 128 | tee "$out/animate.md"
"$python" benchmarks/animate.py command --frames 256 --turns 3 | tee "$out/animate_command.md"
