"""The routing lab: route traces, replay of caches and prefetchers on them, reports, models with given routes."""

from moe_cupy.lab.trace import RouteTrace, TraceError, read_trace, write_trace

__all__ = ["RouteTrace", "TraceError", "read_trace", "write_trace"]
