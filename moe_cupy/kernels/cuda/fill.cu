// slot_at[load_slot[i]][:] = source_of[load_key[i]][:] for the state[4] loads of resolve: missing experts into slots.
// source_of: addresses of experts by key, in host memory that the device can read (mapped and pinned); slot_at:
// addresses of slots; n bytes each. 16 bytes a thread at a time where both addresses allow. grid (blocks of a load,
// used): blocks beyond the number of loads leave at once; no shared memory. Bytes: n over the bus, n to memory, for
// each load. Bus-bound: expected at 80-90 % of what a copy engine reaches, with at least 16 blocks a load. After resolve.
KERNEL(fill)(uint8_t* const* slot_at, const uint8_t* const* source_of, const int* load_key, const int* load_slot,
             const int* state, long long n) {
    const int load = blockIdx.y;
    if (load >= state[4]) return;
    uint8_t* to = slot_at[load_slot[load]];
    const uint8_t* from = source_of[load_key[load]];
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, threads = (long long)gridDim.x * blockDim.x;
    const bool aligned = (((unsigned long long)to | (unsigned long long)from) & 15) == 0;
    const long long wide = aligned ? n / 16 : 0;
    for (long long i = thread; i < wide; i += threads) ((int4*)to)[i] = ((const int4*)from)[i];
    for (long long i = 16 * wide + thread; i < n; i += threads) to[i] = from[i];
}
