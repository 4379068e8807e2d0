// Runs CUDA C++ kernels on a CPU: the names that the kernels use, and a launch. The scheduler is one of two:
// fibers.h (one OS thread, fast) or, with -DEMULATION_THREADS, threads.h (one OS thread per CUDA thread, for the
// thread sanitizer). Blocks are one-dimensional and whole warps; dynamic shared memory starts as NaN.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED(T, name) T* name = (T*)emulation::shared_memory()

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {
constexpr int WARP = 32;
constexpr uint64_t POISON = 0x7ff8dead7ff8deadull;  // NaN as double, as two floats, and as four halves' upper pair
struct Shape {
    dim3 grid;
    unsigned block;
    size_t shared_bytes;
    uint64_t seed;  // 0: lanes run in order; else in a random order that this number determines

    size_t words() const { return shared_bytes / 8 + 1; }
    unsigned blocks() const { return grid.x * grid.y * grid.z; }
    dim3 block_at(unsigned i) const { return {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}; }
};
}  // namespace emulation

#ifdef EMULATION_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait_for_warp(); }
template <class T> T __shfl_sync(unsigned, T value, int source) { return emulation::exchange(value, source); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, (int)(threadIdx.x % 32) ^ mask);
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void mma_16x8x16(int (&c)[4], const int (&a)[2], int b) {  // see prelude.cuh
    const int r = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int t = 0; t < 4; t++) {
        const int rows[2] = {emulation::exchange(a[0], 4 * r + t), emulation::exchange(a[1], 4 * r + t)};
        for (int i = 0; i < 2; i++) {
            const int bytes = emulation::exchange(b, 4 * (column + i) + t);
            for (int m = 0; m < 2; m++) c[2 * m + i] = __dp4a(rows[m], bytes, c[2 * m + i]);
        }
    }
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
template <class T> T atomicAdd(T* where, T value) { return std::atomic_ref<T>(*where).fetch_add(value); }
inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // the build says -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline float half_to_float(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
inline uint16_t float_to_half(float x) {
    _Float16 value = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &value, 2);
    return bits;
}
using std::max;
using std::min;

namespace emulation {
// Calls a kernel with what args[i] point to, as cuLaunchKernel does.
template <class... A, size_t... I> void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A>*)args[I]...);
}
template <class... A> void apply(void (*kernel)(A...), void** args) {
    apply(kernel, args, std::index_sequence_for<A...>{});
}
template <auto kernel> void run(void** args) { apply(kernel, args); }

struct Entry {
    const char* name;
    void (*run)(void** args);
};
inline std::vector<Entry>& entries() {
    static std::vector<Entry> all;
    return all;
}
struct Registration {
    Registration(const char* name, void (*run)(void**)) { entries().push_back({name, run}); }
};

// Empty, or what went wrong.
inline std::string launch(const std::string& name, const Shape& shape, void** args) {
    for (const Entry& entry : entries())
        if (name == entry.name) return launch(shape, [&] { entry.run(args); });
    return "there is no kernel of this name in the library";
}
}  // namespace emulation

#define REGISTER(kernel) static emulation::Registration registered_##kernel(#kernel, emulation::run<&kernel>)
