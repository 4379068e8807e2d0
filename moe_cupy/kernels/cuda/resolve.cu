// Which slot holds each chosen expert, and whom a missing one replaces: the pool and the rules of moe_cupy/cache in
// integers on the device, so that a whole token can be one graph. One event: hits are counted against what was resident
// when it began; an expert of the event is never a victim; free slots go lowest first, then those of the residents with
// the lowest (uses, last touch). What a use changes depends on the rule (moe_cupy/cache/tabled.py).
// state int64 [10] and by_key int64 [keys, 5]: see the names below; key_of int32 [n_slots], -1: free. A key is
// experts * layer + id; ids int32 [used], distinct. slots int32 [used]: by rank, -1 if there was no room. loads int32
// [1 + 3 used]: how many fill must bring, their keys, their slots, and for each whether it has to wait until what is
// fetched ahead (loads of resolve_ahead, or null) has come, because it takes the place of some of that.
// halt int32 [1 + used] or null: if a missing expert is not in memory (source_of 0) the event does not begin, halt gets
// 1 + layer and the missing ids, -1 after them, and later events do nothing. log int32 [1 + n] or null: keys loaded.
// One block; shared: 24 bytes for each warp. Bytes: 28 n_slots for each miss; latency-bound, about 2 us.
// Called once a MoE layer of a decoded token, after router.
#define HALF_LIFE 16  // tokens
#define ONE (1ll << 40)

struct Candidate {
    long long uses, last;
    int slot;
};
__device__ bool goes_first(Candidate a, Candidate b) {
    return a.uses < b.uses || (a.uses == b.uses && a.last < b.last);
}
// All threads: the slot to be filled next, -1 if everyone is in use. found has room for a candidate of each warp.
__device__ int next_slot(Pool p, Candidate* found) {
    const long long event = p.state[EVENT];
    Candidate mine = {NEVER, NEVER, -1};
    for (int s = threadIdx.x; s < p.n_slots; s += blockDim.x) {
        const int key = p.key_of[s];
        Candidate one = {-1, s, s};
        if (key >= 0) {
            const long long* k = p.row(key);
            if (k[TURN] >= event) continue;
            one.uses = k[USES], one.last = k[LAST];
        }
        if (goes_first(one, mine)) mine = one;
    }
    for (int m = 16; m > 0; m >>= 1) {
        Candidate other = {shuffle_xor(mine.uses, m), shuffle_xor(mine.last, m), __shfl_xor_sync(FULL, mine.slot, m)};
        if (goes_first(other, mine)) mine = other;
    }
    if (lane_id() == 0) found[warp_id()] = mine;
    __syncthreads();
    for (int w = 0; w < warp_count(); w++)
        if (goes_first(found[w], mine)) mine = found[w];
    __syncthreads();
    return mine.slot;
}
__device__ long long one_more_use(long long count, long long token, const long long* powers) {
    long long exponent = token / HALF_LIFE, whole = powers[token % HALF_LIFE];
    if (count) {
        const long long before = count / ONE - 1, old = count % ONE + ONE;
        const long long higher = before > exponent ? before : exponent;
        whole = (whole >> min(63ll, higher - exponent)) + (old >> min(63ll, higher - before)), exponent = higher;
    }
    if (whole >= 2 * ONE) whole >>= 1, exponent++;
    return exponent * ONE + whole;
}
__device__ void use(Pool p, long long* k, const long long* powers) {
    if (p.rule == LFU) k[USES]++;
    if (p.rule == DECAYED_LFU) k[USES] = one_more_use(k[USES], p.state[TOKEN], powers);
    if (p.rule == LFU || (p.rule != FIFO && k[SLOT] >= 0)) touch(p, k);
    k[UNUSED] = 0;
}
KERNEL(resolve)(int* slots, int* loads, long long* state, long long* by_key, int* key_of, const long long* powers,
                const int* ids, const int* ahead, const unsigned long long* source_of, int* halt, int* log, int layer,
                int experts, int used, int n_slots, int rule) {
    SHARED(Candidate, found);
    const Pool p = {state, by_key, key_of, n_slots, rule};
    if (threadIdx.x == 0) {
        loads[0] = 0;
        const bool stop = halt && halted(p, halt, ids, source_of, layer, experts, used);
        if (!stop) state[TOKEN] += layer <= state[LAYER], state[LAYER] = layer, state[EVENT]++;
        for (int r = 0; r < used; r++) {
            long long* k = p.row(experts * layer + ids[r]);
            slots[r] = stop ? -1 : (int)k[SLOT];
            if (!stop) use(p, k, powers), pin(p, k), state[HITS] += slots[r] >= 0;
        }
    }
    __syncthreads();
    if (halt && halt[0]) return;
    for (int r = 0; r < used; r++) {
        if (slots[r] >= 0) continue;  // the whole block
        const int slot = next_slot(p, found), key = experts * layer + ids[r];
        if (threadIdx.x == 0) {
            if (slot < 0) state[NO_ROOM]++;
            if (slot >= 0) take_slot(p, key, slot), slots[r] = slot, state[MISSES]++, add_load(loads, used, key, slot, ahead);
            if (slot >= 0 && log) log[1 + log[0]++] = key;
        }
        __syncthreads();
    }
}
// The same for what the next layer is expected to use: ids int32 [used], likeliest first, of which most may come in.
// Nobody of this event (unless apart: the next layer has other slots) or of the first most is a victim; loads as above.
KERNEL(resolve_ahead)(int* loads, long long* state, long long* by_key, int* key_of, const int* ids,
                      const unsigned long long* source_of, const int* halt, int* log, int first_key, int used, int most,
                      int apart, int n_slots, int rule) {
    SHARED(Candidate, found);
    const Pool p = {state, by_key, key_of, n_slots, rule};
    if (threadIdx.x == 0) {
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
        const int slot = next_slot(p, found);
        if (slot < 0) return;
        if (threadIdx.x == 0) {
            take_slot(p, key, slot), p.row(key)[UNUSED] = 1, state[PREFETCHED]++, add_load(loads, used, key, slot, 0);
            if (log) log[1 + log[0]++] = key;
        }
        __syncthreads();
    }
}
