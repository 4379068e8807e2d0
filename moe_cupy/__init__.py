"""Running mixture-of-experts models whose experts do not fit: slots, policies, prefetch, streams.

``Engine`` is imported lazily, so that importing the package costs nothing and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_ref import __version__

if TYPE_CHECKING:
    from moe_cupy.engine import Engine

__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from moe_cupy.engine import Engine

        return Engine
    raise AttributeError(f"module 'moe_cupy' has no attribute {name!r}")
