// order = the pairs (t, r) = t * used + r sorted by the slot they use, stable; first[s] = where slot s begins.
// order int32 [n], first int32 [slots + 1], slot_of int32 [n]; negative slots are left out. One block, shared int32:
// slots + 1. Each thread counts for its slots by reading all n: 4 n slots bytes from L1, about 20 us for n = 4096 and
// 128 slots; latency-bound. Called once a MoE layer of a prompt, before gemm.
KERNEL(group_by_expert)(int* order, int* first, const int* slot_of, int n, int slots) {
    SHARED(int, begins);
    for (int s = threadIdx.x; s < slots; s += blockDim.x) {
        int count = 0;
        for (int i = 0; i < n; i++) count += slot_of[i] == s;
        begins[s + 1] = count;
    }
    if (threadIdx.x == 0) begins[0] = 0;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int s = 0; s < slots; s++) begins[s + 1] += begins[s];
    __syncthreads();
    for (int s = threadIdx.x; s < slots; s += blockDim.x) {
        int at = begins[s];
        for (int i = 0; i < n; i++)
            if (slot_of[i] == s) order[at++] = i;
    }
    for (int s = threadIdx.x; s <= slots; s += blockDim.x) first[s] = begins[s];
}
