"""The planner's tables: TOML files beside this one, each entry with its source."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")  # of llama.cpp's cache
OWN = "moe-cupy"
ENGINES = (OWN, "llama.cpp", "ik_llama.cpp", "ktransformers")  # whose commands are written
DATA = Path(__file__).parent / "data"


class PlanError(ValueError):
    """A request that cannot be planned; says what was wrong and the nearest that works."""


class DoesNotFit(PlanError):
    """A request that is understood, and that the machine has no room for."""


@cache
def table(name: str) -> dict[str, Any]:
    """``data/<name>.toml``."""
    return tomllib.loads((DATA / f"{name}.toml").read_text("utf-8"))


def read_toml(path: str) -> dict[str, Any]:
    """A TOML file of the user's. Raises PlanError naming it for one that is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: is not TOML: {error}") from error


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    items: dict[str, Any] = {}
    for key, value in nested.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items
