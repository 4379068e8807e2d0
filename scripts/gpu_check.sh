#!/bin/sh
# Everything that only a GPU can tell, in under eight minutes: sh scripts/gpu_check.sh [options of moe_cupy gpu-check]
# Runs from the source tree, without installation and without a network: .venv's Python where it has CuPy, else
# PYTHON=/path/to/python or python3, which need numpy, numba and CuPy.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python
if ! "$python" -c 'import cupy' 2>/dev/null; then python=${PYTHON:-python3}; fi
exec "$python" -m moe_cupy gpu-check "$@"
