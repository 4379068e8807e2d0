// Which slot holds each chosen expert, and whom a missing one replaces: the LRU pool of moe_cupy/cache in integers on
// the device, so that a whole token can be one graph. One event: hits are counted against what was resident when it
// began and count as used before the misses; an expert of the event is never a victim; free slots go lowest first.
// slots int32 [used]: by rank, -1 if there was no room. load_key, load_slot int32 [used]: what fill must bring.
// state int32 [6]: uses so far, hits, misses, evictions, loads of this event, events without room. ids int32 [used],
// distinct; slot_of int32 [keys], -1: not resident; key_of int32 [n_slots], -1: free; last_use int32 [n_slots].
// A key is first_key + id. One block; shared: 2 int32 for each warp. Bytes: 8 n_slots for each miss; latency-bound,
// about 2 us. Called once a MoE layer of a decoded token, after router.
KERNEL(resolve)(int* slots, int* load_key, int* load_slot, int* state, const int* ids, int* slot_of, int* key_of,
                int* last_use, int first_key, int used, int n_slots) {
    SHARED(int, found);  // the age and the slot of each warp's oldest
    const int before = state[0], tid = threadIdx.x, warps = warp_count();
    __syncthreads();
    if (tid == 0) {
        state[4] = 0;
        for (int r = 0; r < used; r++) {
            slots[r] = slot_of[first_key + ids[r]];
            if (slots[r] < 0) continue;
            last_use[slots[r]] = ++state[0];
            state[1]++;
        }
    }
    __syncthreads();
    for (int r = 0; r < used; r++) {
        const bool resident = slots[r] >= 0;
        __syncthreads();
        if (resident) continue;  // the whole block
        int age = 0x7fffffff, oldest = -1;
        for (int s = tid; s < n_slots; s += blockDim.x) {
            const int at = key_of[s] < 0 ? -1 : last_use[s];
            if (at <= before && at < age) age = at, oldest = s;
        }
        for (int m = 16; m > 0; m >>= 1) {
            const int other_age = __shfl_xor_sync(FULL, age, m), other = __shfl_xor_sync(FULL, oldest, m);
            if (other_age < age || (other_age == age && other < oldest)) age = other_age, oldest = other;
        }
        if (lane_id() == 0) found[warp_id()] = age, found[warps + warp_id()] = oldest;
        __syncthreads();
        if (tid == 0) {
            for (int w = 0; w < warps; w++)
                if (found[w] < age || (found[w] == age && found[warps + w] < oldest))
                    age = found[w], oldest = found[warps + w];
            if (oldest < 0) {
                state[5]++;
            } else {
                const int key = first_key + ids[r];
                if (key_of[oldest] >= 0) slot_of[key_of[oldest]] = -1, state[3]++;
                slot_of[key] = oldest, key_of[oldest] = key, slots[r] = oldest;
                last_use[oldest] = ++state[0], state[2]++;
                load_key[state[4]] = key, load_slot[state[4]++] = oldest;
            }
        }
        __syncthreads();
    }
}
