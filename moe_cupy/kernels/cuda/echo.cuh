// The policy echo (moe_cupy/cache/echo.py says what is decided and why) for one block; function for function as in
// moe_cupy/compiled/echo_kernel.py, with residents spread over lanes and layers over warps. Formulas are written as
// there, without fused multiply-adds: what may differ is the last bit of logarithms and exponentials.
// Prepended to resolve_echo.cu, after pool.cuh.
#ifndef __CUDACC__
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
#endif
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128  // there is but one block
#define TOKENS 1024
#define WORDS 16
#define TURNS 4
#define SPANS 3
#define LONGEST_REST 300
#define FARTHEST 1.7976931348623157e308

typedef unsigned long long Word;
struct Echo {  // as the record of moe_cupy/compiled/state.py; addresses are set at each launch
    long long source, layers, experts, token, layer, now, found, sliced, neighbours;
    double prior_weight, total[TURNS + 1];
    long long spans[SPANS];
    double habit[5], mix[6], of_rest[LONGEST_REST + 1], of_uses[SPANS][TOKENS + 1];
    Word slices[24][WORDS], windows[SPANS][WORDS], past[WORDS], near[TURNS + 1][WORDS];
    long long *turn, *lowest, *stale, *hidden, *residents, *last, *known, *seen, *pinned;
    double *odds, *prior, *q, *later;
    long long *resident, *place;
    Word (*used)[WORDS], *users;
    long long *inbox, *outbox;

    __device__ int ahead(int l) const { return l > layer ? l - layer : l - layer + layers; }
    __device__ double worth(int key, int ahead) const {
        const double now_ = q[key] / ahead, later_ = later[key];
        return now_ > later_ ? now_ : later_;
    }
};
// One thread: where everything lies; rows int64 [5 layers + 10 keys], of which 4 are float64.
__device__ inline void find_arrays(Echo& s, long long* rows, Word* used, Word* users) {
    const long long keys = s.layers * s.experts;
    long long** by_layer[] = {&s.turn, &s.lowest, &s.stale, &s.hidden, &s.residents};
    long long** by_key[] = {&s.last, &s.known, &s.seen, &s.pinned, (long long**)&s.odds, (long long**)&s.prior,
                            (long long**)&s.q, (long long**)&s.later, &s.resident, &s.place};
    for (long long** array : by_layer) *array = rows, rows += s.layers;
    for (long long** array : by_key) *array = rows, rows += keys;
    s.used = (Word(*)[WORDS])used, s.users = users;
}
struct Worth {  // the lower goes first
    double value;
    int key;
};
__device__ inline bool lower(Worth a, Worth b) { return a.value < b.value || (a.value == b.value && a.key < b.key); }
__device__ inline Worth lowest_of_warp(Worth mine) {
    for (int m = 16; m > 0; m >>= 1) {
        union {
            double value;
            long long bits;
        } other;
        other.value = mine.value;
        other.bits = shuffle_xor(other.bits, m);
        const Worth one = {other.value, __shfl_xor_sync(FULL, mine.key, m)};
        if (lower(one, mine)) mine = one;
    }
    return mine;
}
__device__ inline int ones(Word x) { return __popc((unsigned)x) + __popc((unsigned)(x >> 32)); }
__device__ inline int warp_sum_of(int x) {
    for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
    return x;
}
__device__ inline int common(const Word* a, const Word* b) {
    int n = 0;
    for (int w = 0; w < WORDS; w++) n += ones(a[w] & b[w]);
    return n;
}
__device__ inline Word bit_of(long long position) { return 1ull << (position & 63); }
// Word w of the set of the n positions of the ring that end at ``at``.
__device__ inline Word last_bits(long long n, long long at, int w) {
    Word bits = 0;
    for (int b = 0; b < 64; b++) bits |= (Word)((at - (64 * w + b) + 2 * TOKENS) % TOKENS < n) << b;
    return bits;
}
__device__ inline double probability(double log_odds) { return 1 / (1 + exp(-log_odds)); }

// All threads: nothing is known of the new token, and the one that was at its position is forgotten.
__device__ inline void begin_token(Echo& s) {
    const long long token = s.token + 1, at = token % TOKENS, words = s.layers * s.experts / 64 + 1;
    __syncthreads();
    if (threadIdx.x == 0) s.token = token, s.sliced = 2;
    Word* users = s.users + at * words;
    for (long long w = threadIdx.x; w < words; w += blockDim.x) {
        for (int b = 0; b < 64; b++)
            if (users[w] >> b & 1) s.used[64 * w + b][at / 64] &= ~bit_of(at);
        users[w] = 0;
    }
    for (int i = threadIdx.x; i < 24 * WORDS; i += blockDim.x) s.slices[i / WORDS][i % WORDS] = 0;
    for (int i = threadIdx.x; i < (SPANS + 1) * WORDS; i += blockDim.x) {
        const int span = i / WORDS, w = i % WORDS;
        if (span < SPANS) s.windows[span][w] = last_bits(s.spans[span], at, w);
        else s.past[w] = last_bits(token < TOKENS - 1 ? token : TOKENS - 1, at + TOKENS - 1, w);
    }
    const double share = 1.0 / s.experts < 0.5 ? 1.0 / s.experts : 0.5;
    const long long seen = token + 1;
    for (int i = 0; i < SPANS; i++)
        for (long long n = threadIdx.x; seen <= s.spans[i] && n <= seen; n += blockDim.x)
            s.of_uses[i][n] = __dmul_rn(s.habit[1 + i], log((n + share) / (seen + 1 - n - share)));
    __syncthreads();
}
// All threads: an event of a layer begins; scratch holds an int for each word.
__device__ inline void begin(Echo& s, const int* ids, int layer, int used, int* scratch) {
    const bool is_new = layer <= s.layer;
    __syncthreads();
    if (is_new) begin_token(s);
    if (threadIdx.x == 0) s.layer = layer, s.found = 0, s.now++;
    for (int w = threadIdx.x; w < WORDS; w += blockDim.x) {
        int sliced = s.sliced;
        for (int i = 1; i < sliced; i++) s.slices[i - 1][w] = s.slices[i][w];
        s.slices[sliced - 1][w] = 0;
        for (int r = 0; r < used; r++) {
            Word carry = s.used[layer * s.experts + ids[r]][w];
            int i = 1;
            for (; carry; i++) {
                const Word before = s.slices[i][w];
                s.slices[i][w] = before ^ carry, carry &= before;
            }
            sliced = max(sliced, i);
        }
        scratch[w] = sliced;
    }
    for (int l = threadIdx.x; l < s.layers; l += blockDim.x) s.stale[l] |= s.hidden[l] | (l == layer), s.hidden[l] = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        const long long at = s.token % TOKENS, words = s.layers * s.experts / 64 + 1;
        for (int w = 0; w < WORDS; w++) s.sliced = max(s.sliced, (long long)scratch[w]);
        for (int r = 0; r < used; r++) {
            const long long key = layer * s.experts + ids[r];
            s.used[key][at / 64] |= bit_of(at), s.users[at * words + key / 64] |= bit_of(key), s.last[key] = s.token;
        }
        s.turn[layer] = s.token;
    }
    __syncthreads();
}
// One warp: the most similar past tokens and, turn by turn, those after them; a lane for each word.
__device__ inline void find_neighbours(Echo& s) {
    const int w = lane_id() % WORDS;
    const bool mine = lane_id() < WORDS;
    Word taken = 0, left = mine ? s.past[w] : 0;
    for (long long i = s.sliced - 1; i >= 0; i--) {
        const Word bits = mine ? s.slices[i][w] : 0;
        if (warp_sum_of(ones(taken | (left & bits))) >= s.neighbours) left &= bits;
        else taken |= left & bits, left &= ~bits;
    }
    Word near = taken | left;
    const long long future = (s.token + 1) % TOKENS;
    for (int t = 0; t <= TURNS; t++) {
        if (mine) s.near[t][w] = near;
        const int count = warp_sum_of(ones(near));
        if (lane_id() == 0) s.total[t] = s.prior_weight + count;
        __syncwarp();
        if (mine) near = s.near[t][w] << 1 | s.near[t][(w + WORDS - 1) % WORDS] >> 63;
        if (mine && w == future / 64) near &= ~bit_of(future);
    }
    if (lane_id() == 0) s.found = 1;
    __syncwarp();
}
__device__ inline void learn_habit(Echo& s, int key, long long turn) {
    const long long rest = turn - s.last[key];
    double odds = s.of_rest[rest < LONGEST_REST ? rest : LONGEST_REST];
    for (int i = 0; i < SPANS; i++) odds = __dadd_rn(odds, s.of_uses[i][common(s.used[key], s.windows[i])]);
    s.odds[key] = odds, s.prior[key] = __dmul_rn(s.prior_weight, probability(odds)), s.known[key] = turn;
}
// What a resident promises.
__device__ inline void look_at(Echo& s, int layer, int key) {
    const int ahead = s.ahead(layer), first = layer <= s.layer;
    const double x = (double)ahead / s.layers, bias = __dadd_rn(s.mix[0], __dmul_rn(s.mix[3], x)),
                 habit = __dadd_rn(s.mix[1], __dmul_rn(s.mix[5], x)), near = __dadd_rn(s.mix[2], __dmul_rn(s.mix[4], x));
    if (s.known[key] != s.turn[layer]) learn_habit(s, key, s.turn[layer]);
    const double prior = s.prior[key], uses = common(s.used[key], s.near[first]) + prior;
    const double said = __dmul_rn(near, log(uses / (s.total[first] - uses)));
    const double q = probability(__dadd_rn(__dadd_rn(bias, __dmul_rn(habit, s.odds[key])), said));
    double hits = q, waited = ahead, best = 0;
    for (int i = first + 1; i < min(first + TURNS, TURNS + 1); i++) {
        hits += (common(s.used[key], s.near[i]) + prior) / s.total[i];
        waited += s.layers;
        best = hits / waited > best ? hits / waited : best;
    }
    s.q[key] = q, s.later[key] = best, s.seen[key] = s.now;
}
// One warp: who of a layer's residents is worth least; looking: at all of them before; passing: those in use.
__device__ inline void find_lowest(Echo& s, Pool p, int layer, bool looking, bool passing) {
    const long long* resident = s.resident + layer * s.experts;
    Worth mine = {FARTHEST, -1};
    for (int i = lane_id(); i < s.residents[layer]; i += 32) {
        const int key = resident[i];
        if (looking) look_at(s, layer, key);
        if (passing && p.row(key)[TURN] >= p.state[EVENT]) continue;
        const Worth one = {s.worth(key, s.ahead(layer)), key};
        if (mine.key < 0 || lower(one, mine)) mine = one;
    }
    mine = lowest_of_warp(mine);
    if (lane_id() == 0) s.lowest[layer] = mine.key;
    __syncwarp();
}
// All threads: look at who was used or came, and whose turn has just been.
__device__ inline void prepare(Echo& s, Pool p) {
    const bool is_found = s.found;
    __syncthreads();
    if (!is_found && warp_id() == 0) find_neighbours(s);
    for (int l = threadIdx.x; l < s.layers; l += blockDim.x) s.stale[l] |= s.hidden[l], s.hidden[l] = 0;
    __syncthreads();
    for (int l = warp_id(); l < s.layers; l += warp_count())
        if (s.stale[l]) {
            __syncwarp();
            find_lowest(s, p, l, true, false);
            if (lane_id() == 0) s.stale[l] = 0;
        }
    __syncthreads();
}
// One warp: whom to give up, nobody in use; -1 if there is none.
__device__ inline int victim(Echo& s, Pool p) {
    for (;;) {
        Worth mine = {FARTHEST, -1};  // key: the layer
        for (int l = lane_id(); l < s.layers; l += 32)
            if (s.lowest[l] >= 0) {
                const Worth one = {s.worth(s.lowest[l], s.ahead(l)), l};
                if (mine.key < 0 || lower(one, mine)) mine = one;
            }
        const int layer = lowest_of_warp(mine).key;
        if (layer < 0) return -1;
        const int key = s.lowest[layer];
        const bool in_use = p.row(key)[TURN] >= p.state[EVENT], is_fresh = s.seen[key] == s.now;
        if (!in_use && is_fresh) return key;
        __syncwarp();
        if (lane_id() == 0 && in_use) s.hidden[layer] = 1;
        if (lane_id() == 0 && !in_use) look_at(s, layer, key);
        __syncwarp();
        find_lowest(s, p, layer, false, in_use);
    }
}
// One warp.
__device__ inline void evict(Echo& s, Pool p, int key) {
    const int layer = key / s.experts;
    const bool was_lowest = s.lowest[layer] == key;
    __syncwarp();
    if (lane_id() == 0) {
        const long long n = --s.residents[layer], moved = s.resident[layer * s.experts + n];  // it closes the gap
        s.resident[layer * s.experts + s.place[key]] = moved;
        s.place[moved] = s.place[key], s.place[key] = -1;
    }
    __syncwarp();
    if (was_lowest) find_lowest(s, p, layer, false, false);
}
// One thread.
__device__ inline void admit(Echo& s, int key) {
    const int layer = key / s.experts, ahead = s.ahead(layer);
    s.resident[layer * s.experts + s.residents[layer]] = key, s.place[key] = s.residents[layer]++;
    if (!s.found) {
        s.stale[layer] = 1;
        return;
    }
    look_at(s, layer, key);
    const int other = s.lowest[layer];
    if (other < 0 || lower({s.worth(key, ahead), key}, {s.worth(other, ahead), other})) s.lowest[layer] = key;
}
