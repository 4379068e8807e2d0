"""How each kernel is launched: shapes in, grid, block and arguments out. Arrays may be NumPy's or CuPy's.

One function a kernel, so that the emulated device, a GPU and the tests launch alike. Arrays are C-contiguous,
float32 and int32 unless said; ``None`` is a null pointer. ``block`` is the number of threads of a block, a multiple
of 32 up to 256. Q8 blocks are uint8 [..., cols / 32, 40]. What each kernel computes is in the head of its file.
"""

from __future__ import annotations

from moe_cupy.kernels.cuda.launches.attention import (
    CacheRows,
    Sight,
    attention_combine,
    attention_decode,
    attention_prefill,
    hadamard,
    kv_store,
    prefill_tile,
    rope,
)
from moe_cupy.kernels.cuda.launches.core import (
    ACTIVATIONS,
    BEST_BYTES,
    GATINGS,
    MAX_VALUE_LENGTH,
    MOST_RANKS,
    MOST_SHARED_BYTES,
    NORMS,
    Launch,
    Pointers,
    ceil_div,
    is_q8,
)
from moe_cupy.kernels.cuda.launches.experts import (
    BY_KEY,
    NO_HALT,
    STATE,
    Halt,
    Residency,
    Slots,
    expert_down,
    expert_gate_up,
    fill,
    resolve,
    resolve_ahead,
    router,
)
from moe_cupy.kernels.cuda.launches.matrices import (
    argmax,
    embed,
    gemm,
    gemv,
    gemv_naive,
    group_by_expert,
    quantize_q8,
    rms_norm,
    top_k,
    top_k_parts,
)
from moe_cupy.kernels.cuda.launches.small import (
    activate,
    add_scaled,
    clamp,
    combine,
    delta_convolve,
    delta_gates,
    delta_recur,
    multiply,
    softcap,
)

__all__ = [
    "ACTIVATIONS", "BEST_BYTES", "GATINGS", "MAX_VALUE_LENGTH", "MOST_RANKS", "MOST_SHARED_BYTES", "NORMS",
    "Launch", "Pointers", "ceil_div", "is_q8",
    "rms_norm", "quantize_q8", "gemv", "gemv_naive", "gemm", "group_by_expert", "embed", "argmax", "top_k",
    "top_k_parts",
    "router", "Slots", "expert_gate_up", "expert_down", "Residency", "Halt", "NO_HALT", "STATE", "BY_KEY", "resolve",
    "resolve_ahead", "fill",
    "Sight", "CacheRows", "rope", "hadamard", "kv_store", "attention_decode", "attention_combine", "attention_prefill",
    "prefill_tile",
    "add_scaled", "multiply", "activate", "softcap", "clamp", "combine", "delta_convolve", "delta_gates", "delta_recur",
]  # fmt: skip
