"""Where expert bytes live and how they get into a slot."""

from moe_cupy.store.experts import ExpertStore
from moe_cupy.store.files import RangeFile, StoreError
from moe_cupy.store.layout import MATRICES, Layout, expert_layout
from moe_cupy.store.packed import Packed
from moe_cupy.store.repacked import Repacked, StoreMismatch, arrange, header_bytes, open_repacked

__all__ = [
    "MATRICES", "ExpertStore", "Layout", "Packed", "RangeFile", "Repacked", "StoreError", "StoreMismatch", "arrange",
    "expert_layout", "header_bytes", "open_repacked",
]  # fmt: skip
