"""Running mixture-of-experts models whose experts do not fit: slots, policies, prefetch, streams.

>>> from moe_cupy import Engine, Sampler
>>> with Engine("data/moe-40m-Q4_K_M.gguf", cache="25%") as engine:
...     text = "".join(engine.generate("The king", max_tokens=8, sampler=Sampler(temp=0.8, seed=1)))
>>> engine.stats.generated_tokens
8

What ``__all__`` names is imported when first used, so that importing the package costs nothing and needs no GPU.
"""

from __future__ import annotations

from moe_ref import __version__

TYPE_CHECKING = False  # as in typing, whose import is most of what `python -m moe_cupy` does before it hears Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from moe_cupy.engine import Engine, Options, Stats
    from moe_ref.sampling import Sampler

__all__ = ["Engine", "Options", "Sampler", "Stats", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Sampler":
        from moe_ref.sampling import Sampler

        return Sampler
    if name in ("Engine", "Options", "Stats"):
        from moe_cupy import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'moe_cupy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
