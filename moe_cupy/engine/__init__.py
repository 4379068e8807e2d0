"""The runtime: dense weights resident, experts through the cache, decode and prefill loops."""

from moe_cupy.engine.engine import Engine, Options
from moe_cupy.engine.stats import Stats

__all__ = ["Engine", "Options", "Stats"]
