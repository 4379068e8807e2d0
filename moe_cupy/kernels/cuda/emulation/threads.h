// Every CUDA thread of a block is an OS thread, for the thread sanitizer. Each walks over all blocks, and nothing but
// the kernel's own barriers orders them; every block has shared memory of its own. So races within a block are seen,
// and many between blocks. A barrier that not all reach hangs: fibers.h is what reports those.
#pragma once
#include <barrier>
#include <memory>
#include <thread>

inline dim3 blockDim, gridDim;
inline thread_local dim3 blockIdx, threadIdx;

namespace emulation {
struct Warp {
    std::barrier<> barrier{WARP};
    uint32_t lane[WARP];
};
struct Launch {
    std::barrier<> barrier;
    std::unique_ptr<Warp[]> warps;
    std::vector<std::vector<uint64_t>> shared;  // of each block
};
inline Launch* current;
inline thread_local unsigned block_number;

inline void* shared_memory() { return current->shared[block_number].data(); }
inline void wait_for_block() { current->barrier.arrive_and_wait(); }
inline void wait_for_warp() { current->warps[threadIdx.x / WARP].barrier.arrive_and_wait(); }
template <class T> T exchange(T value, int source) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    Warp& warp = current->warps[threadIdx.x / WARP];
    memcpy(&warp.lane[threadIdx.x % WARP], &value, 4);
    warp.barrier.arrive_and_wait();
    memcpy(&value, &warp.lane[source & 31], 4);
    warp.barrier.arrive_and_wait();
    return value;
}
template <class F> std::string launch(const Shape& shape, F body) {
    std::vector<std::vector<uint64_t>> shared(shape.blocks(), std::vector<uint64_t>(shape.words(), POISON));
    Launch state{std::barrier<>(shape.block), std::make_unique<Warp[]>(shape.block / WARP), std::move(shared)};
    current = &state;
    gridDim = shape.grid, blockDim = {shape.block, 1, 1};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < shape.block; t++)
        threads.emplace_back([&, t] {
            threadIdx = {t, 0, 0};
            for (block_number = 0; block_number < shape.blocks(); block_number++) {
                blockIdx = shape.block_at(block_number);
                body();
            }
        });
    for (std::thread& thread : threads) thread.join();
    return "";
}
}  // namespace emulation
