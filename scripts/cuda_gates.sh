#!/bin/sh
# Compile every CUDA kernel for every architecture without a GPU or a toolkit, and compare what they need with
# docs/kernels.md: sh scripts/cuda_gates.sh [--write]
# NVRTC and ptxas come from pip wheels (some 463 MB once installed) into .venv.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python

sh scripts/bootstrap.sh dev
"$python" -c 'from moe_cupy.kernels.cuda.toolchain import NVRTC, ptxas_path; NVRTC(); ptxas_path()' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check -e '.[cuda-gates]' || exit 75 # no compilers to be had
if [ "${1:-}" = --write ]; then
    exec "$python" -m moe_cupy.kernels.cuda.gates --write docs/kernels.md
fi
exec "$python" -m pytest -q -m 'slow or not slow' tests/moe_cupy/test_cuda_gates.py
