// slot_at[slot][:] = source_of[key][:] for the loads of resolve (or resolve_ahead), missing experts into slots, but only
// those that have to wait for what was fetched ahead (late 1) or only the others (late 0).
// source_of: addresses of experts by key, in host memory that the device can read (mapped and pinned); slot_at:
// addresses of slots; n bytes each; loads int32 [1 + 3 used], see resolve.cu. 16 bytes a thread at a time where both
// addresses allow. grid (blocks of a load, used): blocks beyond the number of loads leave at once; no shared memory.
// Bytes: n over the bus, n to memory, for each load. Bus-bound: expected at 80-90 % of what a copy engine reaches, with
// at least 16 blocks a load. After resolve.
KERNEL(fill)(uint8_t* const* slot_at, const uint8_t* const* source_of, const int* loads, int used, int late,
             long long n) {
    const int load = blockIdx.y;
    if (load >= loads[0] || loads[1 + 2 * used + load] != late) return;
    uint8_t* to = slot_at[loads[1 + used + load]];
    const uint8_t* from = source_of[loads[1 + load]];
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, threads = (long long)gridDim.x * blockDim.x;
    const bool aligned = (((unsigned long long)to | (unsigned long long)from) & 15) == 0;
    const long long wide = aligned ? n / 16 : 0;
    for (long long i = thread; i < wide; i += threads) ((int4*)to)[i] = ((const int4*)from)[i];
    for (long long i = 16 * wide + thread; i < n; i += threads) to[i] = from[i];
}
