#!/bin/sh
# What `make test` runs: sh scripts/test.sh [--all | --lint]
# Stops at the first step that fails and names it; pytest's closing line is the last line of a good run.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python

select='not slow'
lint_only=no
case ${1:-} in
    '') ;;
    --all) select='slow or not slow' ;;
    --lint) lint_only=yes ;;
    *) echo "test.sh: '$1' is none of --all, --lint" >&2; exit 2 ;;
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

sh scripts/bootstrap.sh dev
step "ruff check" "$python" -m ruff check .
step "ruff format" "$python" -m ruff format --check .
step "mypy" "$python" -m mypy moe_ref moe_cupy
if [ "$lint_only" = yes ]; then exit 0; fi

# The notebooks are run by tests/course/test_runs.py, each once: cells, printed solutions, saved outputs.
step "pytest: tests and notebooks" "$python" -m pytest -q --durations=10 -m "$select" tests
