#!/bin/sh
# Make .venv ready: sh scripts/bootstrap.sh [base|dev|notebooks]
#
# Needs a Python >= 3.11 with its venv module and, when there is something to install, the network.
# PYTHON=/path/to/python chooses the interpreter. When all is in place it says nothing and is done at once:
# .venv/.installed-* remember what was installed, for which pyproject.toml and in which folder.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."

what=${1:-base}
case $what in
    base) spec=. ;;
    dev | notebooks) spec=".[$what]" ;;
    *) echo "bootstrap: '$what' is none of base, dev, notebooks" >&2; exit 2 ;;
esac
venv_python=.venv/bin/python
log=.venv/install.log

say() { printf '%s\n' "$*"; }

fail() {
    printf '\n%s\n' "$1" >&2
    exit 1
}

runs_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
makes_venvs() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

no_python() {
    fail "$1
This project needs Python 3.11 or newer. Debian 12, Ubuntu 24.04 and later: sudo apt install python3 python3-venv.
Fedora: sudo dnf install python3.12. macOS: brew install python@3.12. Elsewhere: python.org/downloads.
If it lies in an unusual place, name it: PYTHON=/path/to/python3.12 make demo"
}

no_venv() {
    fail "$1 (Python $2) cannot create virtual environments: its venv or ensurepip module is missing or fails.
Debian and Ubuntu ship them apart. Install them, then run this command again:
    sudo apt install python3-venv        (python$2-venv for a Python beside the system's own)
Or name another Python >= 3.11: PYTHON=/path/to/python3.12 make demo"
}

# Sets $python to the first interpreter that is new enough and can make an environment.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON") || no_python "PYTHON is set to '$PYTHON', which does not run as a Python."
        runs_311 "$PYTHON" || no_python "PYTHON is set to '$PYTHON', which is Python $version."
        makes_venvs "$PYTHON" || no_venv "$PYTHON" "$version"
        python=$PYTHON
        return
    fi
    bare='' # new enough, but without venv
    for python in python3.13 python3.12 python3.11 python3; do
        runs_311 "$python" || continue
        if makes_venvs "$python"; then return; fi
        bare=${bare:-$python}
    done
    if [ -n "$bare" ]; then no_venv "$bare" "$(version_of "$bare")"; fi
    version=$(version_of python3) && no_python "python3 is Python $version, and no newer one was found."
    no_python "No Python was found."
}

create_venv() {
    find_python
    if [ -e .venv ]; then say "setup: .venv is incomplete or its Python is gone; building it anew"; fi
    say "setup: creating .venv with $python (Python $(version_of "$python"))"
    if ! output=$("$python" -m venv --clear .venv 2>&1) || ! venv_works; then
        printf '%s\n' "$output" | tail -n 8 | sed 's/^/    /' >&2
        no_venv "$python" "$(version_of "$python")"
    fi
}

venv_works() { "$venv_python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# What pip says without a network; "from versions: none" is its word for an index that did not answer.
offline='name resolution|name or service|unreachable|timed out|connection|max retries|proxyerror|sslerror|versions: none'

why_pip_failed() {
    if grep -qiE 'no space left' "$log"; then
        say "The disk is full."
    elif grep -qiE "$offline" "$log"; then
        say "pip could not reach the package index: check the network and, behind a proxy, HTTPS_PROXY."
        say "(pip's own settings hold here: PIP_INDEX_URL or pip.conf name another index.)"
    fi
    say "The whole output is in $log; the next run takes up where this one stopped."
}

install() {
    say "setup: installing $2 into .venv; the first time this downloads some $3 MB"
    # PIP_USER=0: a user's pip.conf may say `user = true`, which pip refuses inside an environment.
    if ! PIP_USER=0 "$venv_python" -m pip install --disable-pip-version-check --no-input --prefer-binary \
        --progress-bar off --editable "$1" </dev/null >"$log" 2>&1; then
        printf '\npip failed. Its last lines:\n' >&2
        tail -n 12 "$log" | sed 's/^/    /' >&2
        fail "$(why_pip_failed)"
    fi
}

stamp=$(printf '%s %s' "$(cksum <pyproject.toml)" "$PWD")
is_installed() { [ "$(cat ".venv/.installed-$1" 2>/dev/null)" = "$stamp" ]; }
mark_installed() { printf '%s\n' "$stamp" >".venv/.installed-$1"; }

if ! venv_works; then create_venv; fi
if ! is_installed "$what"; then
    case $what in
        base) install "$spec" "the package and what it runs on" 90 ;;
        dev) install "$spec" "the package and the test tools" 170 ;;
        notebooks) install "$spec" "the package and JupyterLab" 190 ;;
    esac
    mark_installed base
    mark_installed "$what"
    say "setup: done"
fi
