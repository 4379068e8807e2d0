"""Predictors: which experts a layer will want before its router has spoken. Pure functions of integers."""

from moe_cupy.prefetch.catalogue import PREFETCHERS
from moe_cupy.prefetch.predictors import NextGate, NoPrefetch, Prefetcher, rank

__all__ = ["PREFETCHERS", "NextGate", "NoPrefetch", "Prefetcher", "rank"]
