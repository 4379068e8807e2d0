// As resolve and resolve_ahead (see resolve.cu) under the policy echo (see echo.cuh), whose memory is the record echo with rows and sets.
// One block; shared: 16 int32 and one for each warp. Bytes: at most 800 for each resident of the layers that were used
// since someone was given up last; latency-bound, about 10 us and 10 more for each miss. Called once a MoE layer of a
// decoded token, after router.

// All threads: the slot to be filled next, which nobody holds then; -1 if everyone is in use.
__device__ int echo_slot(Echo& s, Pool p, int* scratch) {
    int free = p.n_slots;
    for (int i = threadIdx.x; i < p.n_slots && free == p.n_slots; i += blockDim.x)
        if (p.key_of[i] < 0) free = i;
    for (int m = 16; m > 0; m >>= 1) free = min(free, __shfl_xor_sync(FULL, free, m));
    if (lane_id() == 0) scratch[WORDS + warp_id()] = free;
    __syncthreads();
    for (int w = 0; w < warp_count(); w++) free = min(free, scratch[WORDS + w]);
    if (free < p.n_slots) return free;
    prepare(s, p);
    if (warp_id() == 0) {
        const int key = victim(s, p);
        if (lane_id() == 0) scratch[0] = key < 0 ? -1 : (int)p.row(key)[SLOT];
        if (key >= 0) evict(s, p, key);
    }
    __syncthreads();
    return scratch[0];
}
KERNEL(resolve_echo)(int* slots, int* loads, long long* echo, long long* rows, unsigned long long* used_by,
                     unsigned long long* users, long long* state, long long* by_key, int* key_of,
                     const int* ids, const int* ahead, const unsigned long long* source_of, int* halt, int* log,
                     int layer, int experts, int used, int n_slots) {
    SHARED(int, scratch);
    const Pool p = {state, by_key, key_of, n_slots, LRU};
    Echo& s = *(Echo*)echo;
    if (threadIdx.x == 0) {
        find_arrays(s, rows, used_by, users);
        loads[0] = 0;
        const bool stop = halt && halted(p, halt, ids, source_of, layer, experts, used);
        state[EVENT] += !stop;
        for (int r = 0; r < used; r++) {
            long long* k = p.row(experts * layer + ids[r]);
            slots[r] = stop ? -1 : (int)k[SLOT];
            if (!stop) k[UNUSED] = 0, pin(p, k), state[HITS] += slots[r] >= 0;
        }
    }
    __syncthreads();
    if (halt && halt[0]) return;
    begin(s, ids, layer, used, scratch);
    for (int r = 0; r < used; r++) {
        if (slots[r] >= 0) continue;  // the whole block
        const int slot = echo_slot(s, p, scratch), key = experts * layer + ids[r];
        __syncthreads();
        if (threadIdx.x == 0) {
            if (slot < 0) state[NO_ROOM]++;
            if (slot >= 0) take_slot(p, key, slot), slots[r] = slot, state[MISSES]++, add_load(loads, used, key, slot, ahead);
            if (slot >= 0) admit(s, key);
            if (slot >= 0 && log) log[1 + log[0]++] = key;
        }
        __syncthreads();
    }
}
KERNEL(resolve_echo_ahead)(int* loads, long long* echo, long long* rows, unsigned long long* used_by,
                           unsigned long long* users, long long* state, long long* by_key, int* key_of, const int* ids,
                           const unsigned long long* source_of, const int* halt, int* log, int first_key, int used,
                           int most, int apart, int n_slots) {
    SHARED(int, scratch);
    const Pool p = {state, by_key, key_of, n_slots, LRU};
    Echo& s = *(Echo*)echo;
    if (threadIdx.x == 0) {
        find_arrays(s, rows, used_by, users);
        loads[0] = 0;
        const bool stop = halt && halt[0];
        state[EVENT] += apart && !stop;
        for (int r = 0; r < most && !stop; r++) pin(p, p.row(first_key + ids[r]));
    }
    __syncthreads();
    if (halt && halt[0]) return;
    for (int r = 0; r < most; r++) {
        const int key = first_key + ids[r];
        if (p.row(key)[SLOT] >= 0 || (halt && source_of[key] == 0)) continue;  // the whole block
        const int slot = echo_slot(s, p, scratch);
        if (slot < 0) return;
        __syncthreads();
        if (threadIdx.x == 0) {
            take_slot(p, key, slot), p.row(key)[UNUSED] = 1, state[PREFETCHED]++, add_load(loads, used, key, slot, 0);
            admit(s, key);
            if (log) log[1 + log[0]++] = key;
        }
        __syncthreads();
    }
}
