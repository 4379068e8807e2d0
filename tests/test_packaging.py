"""pyproject.toml promises what the README and the Makefile rely on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import moe_ref

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """Distribution names without bounds: 'numpy>=2.0' -> 'numpy'."""
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


def test_the_distribution_is_named_and_licensed():
    assert PROJECT["name"] == "moe-offload"
    assert PROJECT["license"] == "MIT"
    assert PROJECT["requires-python"] == ">=3.11"
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License")
    assert (ROOT / PROJECT["readme"]).is_file(), "pip refuses to install without the readme that pyproject.toml names"


def test_versions_agree():
    assert PROJECT["version"] == moe_ref.__version__
    assert f"## [{moe_ref.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_base_install_runs_the_host_device():
    assert names(PROJECT["dependencies"]) == {"numpy", "numba", "tqdm", "tokenizers", "jinja2"}
    assert "numpy>=2.0" in PROJECT["dependencies"]


def test_the_extras_are_there():
    assert set(EXTRAS) == {"cuda12", "cuda13", "cuda-gates", "completion", "notebooks", "dev"}
    assert names(EXTRAS["cuda12"]) == {"cupy-cuda12x"}
    assert names(EXTRAS["cuda13"]) == {"cupy-cuda13x"}
    assert names(EXTRAS["notebooks"]) >= {"jupyterlab", "ipykernel", "ipywidgets", "matplotlib", "nbclient", "gguf"}


def test_dev_runs_the_notebooks_without_jupyterlab():
    assert names(EXTRAS["dev"]) >= {"pytest", "hypothesis", "ruff", "mypy"}
    assert names(EXTRAS["notebooks"]) - names(EXTRAS["dev"]) == {"jupyterlab"}


def test_console_scripts_watch_for_interrupts_first():
    assert PROJECT["scripts"] == {"moe-ref": "moe_ref.script:script", "moe-cupy": "moe_cupy.__main__:script"}


@pytest.mark.parametrize("package", ["moe_ref", "moe_cupy"])
def test_every_folder_of_code_is_a_package(package):
    """setuptools leaves a folder without __init__.py out of the wheel, silently."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    bare = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file())
    assert not bare, f"without __init__.py: {', '.join(bare)}"


def test_kernel_sources_travel_with_the_packages():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    assert {f"**/*.{suffix}" for suffix in ("cu", "cuh", "h", "cpp", "toml", "npz")} <= set(patterns)


@pytest.mark.parametrize("package", ["moe_ref", "moe_cupy"])
def test_type_checkers_are_told_that_the_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["*"]


@pytest.mark.parametrize("script", ["scripts/bootstrap.sh", "scripts/demo.sh", "scripts/test.sh", ".ci/run"])
def test_the_commands_that_need_no_make_are_there(script):
    assert (ROOT / script).is_file()
