"""Where expert bytes live and how they get into a slot."""

from moe_cupy.store.experts import ExpertStore
from moe_cupy.store.files import RangeFile, StoreError
from moe_cupy.store.layout import MATRICES, Layout, expert_layout

__all__ = ["MATRICES", "ExpertStore", "Layout", "RangeFile", "StoreError", "expert_layout"]
