#!/bin/sh
# What `make demo` runs: set up .venv, then the demonstration. Arguments go to the demonstration.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
sh scripts/bootstrap.sh base
exec .venv/bin/python -m moe_cupy.demo "$@"
