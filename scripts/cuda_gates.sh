#!/bin/sh
# Compile every CUDA kernel without a GPU or a toolkit and compare what they need with docs/kernels.md:
#   sh scripts/cuda_gates.sh            for the oldest and the newest architecture
#   sh scripts/cuda_gates.sh --all      for all seven: a quarter of an hour of one core (make cuda-gates)
#   sh scripts/cuda_gates.sh --write    write the table of docs/kernels.md
#   sh scripts/cuda_gates.sh --install  install the compilers, no more
# NVRTC and ptxas come from pip wheels (some 463 MB once installed) into .venv; exit status 75: they cannot be had.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python
which='not sm_ or sm_75 or sm_120' # names of tests
case ${1:-} in
    '' | --write | --install) ;;
    --all) which='' ;;
    *) echo "cuda_gates.sh: '$1' is none of --all, --write, --install" >&2; exit 2 ;;
esac

sh scripts/bootstrap.sh dev
"$python" -c 'from moe_cupy.kernels.cuda.toolchain import NVRTC, ptxas_path; NVRTC(); ptxas_path()' 2>/dev/null ||
    PIP_USER=0 "$python" -m pip install --quiet --disable-pip-version-check -e '.[cuda-gates]' || exit 75
case ${1:-} in
    --install) exit 0 ;;
    --write) exec "$python" -m moe_cupy.kernels.cuda.gates --write docs/kernels.md ;;
esac
exec "$python" -m pytest -q -m 'slow or not slow' -k "$which" tests/moe_cupy/test_cuda_gates.py
