"""Where tests find the shared reference data, how they skip where it is absent; slow tests in shares."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slow_shares import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

TESTS = Path(__file__).resolve().parent
SHARED = Path(__file__).resolve().parents[2] / "shared"

if str(TESTS) not in sys.path:  # `from gguf_writer import write_gguf` under every pytest import mode
    sys.path.append(str(TESTS))


def shared_files(*patterns: str, marks: Any = ()) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: the files matching a glob under SHARED, or one skipped parameter."""
    found = sorted(path for pattern in patterns for path in SHARED.glob(pattern))
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {', '.join(patterns)} in {SHARED}"))]
    return [pytest.param(path, id=path.name, marks=marks) for path in found]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder; skips the test where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED
