#!/bin/sh
# What `make test` runs: sh scripts/test.sh [--all | --share K/N | --lint]
#   --all        the slow tests too
#   --share 3/7  nothing but the third of seven parts of the slow tests (tests/slow_shares.py); .ci/run: one a day
# Stops at the first step that fails and names it; pytest's closing line is the last line of a good run.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python
exec </dev/null # no test may wait for a person, and where standard input is closed a file would take its number

usage() {
    echo "test.sh: '$*' is none of --all, --share K/N, --lint" >&2
    exit 2
}

lint=yes tests=fast
case "$#${1:-}" in
    0) ;;
    1--all) tests=all ;;
    1--lint) tests=none ;;
    2--share) lint=no tests=share share=$2 ;;
    *) usage "$@" ;;
esac

step() {
    name=$1
    shift
    printf '\n== %s ==\n' "$name"
    "$@" || {
        code=$?
        printf '\nstopped: %s failed (exit status %s)\n' "$name" "$code" >&2
        exit "$code"
    }
}

# The reference's matrices are small: more BLAS threads gain a fifth on an idle machine, and where cores are shared they
# wait for each other, twenty times as long.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

# A process for each core, at most four; each takes whole files, so that what a file's tests share is made once; in the
# order of the files, for the dear ones have few tests. The notebooks are run by tests/course.
pytest() {
    "$python" -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
}

sh scripts/bootstrap.sh dev
if [ "$lint" = yes ]; then
    step "ruff check" "$python" -m ruff check .
    step "ruff format" "$python" -m ruff format --check .
    step "mypy" "$python" -m mypy moe_ref moe_cupy
fi
case $tests in
    fast) step "pytest: tests and notebooks" pytest -m 'not slow' tests ;;
    all)
        sh scripts/cuda_gates.sh --install || echo 'the CUDA kernels are NOT compiled for GPUs: no NVRTC and ptxas here' >&2
        step "pytest: all tests and notebooks" pytest -m 'slow or not slow' tests
        ;;
    share)
        step "pytest: part $share of the slow tests (again: sh scripts/test.sh --share $share)" \
            pytest -m slow --slow-share "$share" tests
        ;;
esac
