// The pool of experts that resolve.cu and resolve_echo.cu keep: who is in which slot, who is in use, what is to be
// loaded. Prepended to these files alone. state, by_key, key_of and loads are explained in resolve.cu.
enum { NOW, TOKEN, LAYER, EVENT, HITS, MISSES, EVICTIONS, NO_ROOM, PREFETCHED, WASTED };  // of state
enum { SLOT, USES, LAST, TURN, UNUSED, COLUMNS };  // of by_key: -1 if not resident; …; last event in use; fetched ahead
enum { LRU, FIFO, LFU, DECAYED_LFU };
#define NEVER 0x7fffffffffffffffll

struct Pool {
    long long *state, *by_key;
    int *key_of, n_slots, rule;
    __device__ long long* row(int key) const { return by_key + (long long)COLUMNS * key; }
};
__device__ inline long long shuffle_xor(long long x, int m) {
    const unsigned low = __shfl_xor_sync(FULL, (unsigned)x, m);
    return (long long)__shfl_xor_sync(FULL, (int)(x >> 32), m) << 32 | low;
}
__device__ inline void touch(Pool p, long long* k) { k[LAST] = ++p.state[NOW]; }
__device__ inline void pin(Pool p, long long* k) { k[TURN] = max(k[TURN], p.state[EVENT]); }
__device__ inline void take_slot(Pool p, int key, int slot) {
    long long* k = p.row(key);
    if (p.key_of[slot] >= 0) {
        long long* old = p.row(p.key_of[slot]);
        p.state[EVICTIONS]++, p.state[WASTED] += old[UNUSED];
        old[SLOT] = -1, old[UNUSED] = 0;
    }
    k[SLOT] = slot, p.key_of[slot] = key;
    if (p.rule != LFU || k[LAST] == 0) touch(p, k);
}
__device__ inline void add_load(int* loads, int used, int key, int slot, const int* ahead) {
    const int i = loads[0]++;
    loads[1 + i] = key, loads[1 + used + i] = slot, loads[1 + 2 * used + i] = 0;
    for (int a = 0; ahead && a < ahead[0]; a++)
        if (ahead[1 + used + a] == slot) loads[1 + 2 * used + i] = 1;
}
// One thread: whether a missing expert cannot be had, or one of an earlier layer could not.
__device__ inline bool halted(Pool p, int* halt, const int* ids, const unsigned long long* source_of, int layer, int experts,
                       int used) {
    if (halt[0]) return true;
    int missing = 0, absent = 0;
    for (int r = 0; r < used; r++) {
        const int key = experts * layer + ids[r];
        if (p.row(key)[SLOT] >= 0) continue;
        halt[1 + missing++] = ids[r], absent += source_of[key] == 0;
    }
    for (int i = missing; i < used; i++) halt[1 + i] = -1;
    if (absent) halt[0] = 1 + layer;
    return absent;
}
