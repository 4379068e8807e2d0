#!/bin/sh
# What `make notebooks` runs: set up .venv, then JupyterLab on the course. Arguments go to JupyterLab.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
sh scripts/bootstrap.sh notebooks
exec .venv/bin/python -m jupyterlab --notebook-dir=notebooks "$@"
