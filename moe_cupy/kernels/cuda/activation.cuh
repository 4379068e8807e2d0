// Gated activations; the numbers are those of launches.ACTIVATIONS. gelu in its tanh form; oai as gpt-oss clamps it.
enum { SILU = 0, GELU = 1, SWIGLU_OAI = 2 };
__device__ __forceinline__ float gated(int activation, float gate, float up) {
    if (activation == SILU) return gate * sigmoid(gate) * up;
    if (activation == GELU)
        return 0.5f * gate * (1.f + tanhf(0.7978845608028654f * gate * (1.f + 0.044715f * gate * gate))) * up;
    if (!(fabsf(gate) < INFINITE && fabsf(up) < INFINITE)) return NOT_A_NUMBER;
    gate = fminf(gate, 7.f), up = fminf(fmaxf(up, -7.f), 7.f);
    return gate * sigmoid(1.702f * gate) * (up + 1.f);
}
