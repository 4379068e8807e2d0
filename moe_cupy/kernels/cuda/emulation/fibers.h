// Every CUDA thread of a block is a fiber on one OS thread. A barrier switches to the next fiber; nothing runs in
// parallel, so races show only through the order of lanes (Shape::seed). A barrier that not all reach is reported.
#pragma once
#include <memory>
#include <mutex>
#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_SWITCH
#else
#include <ucontext.h>
#endif

inline dim3 blockDim, gridDim, blockIdx, threadIdx;

namespace emulation {
#ifdef EMULATION_SWITCH
// Saves the registers that a call must preserve on the old stack and takes them from the new one.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.weak emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
struct Context {
    void* at = nullptr;
    void start(char* stack, size_t size, void (*entry)()) {
        void** top = (void**)(stack + size - 64);
        *--top = nullptr;  // where entry would return to; also what aligns the stack as after a call
        *--top = (void*)entry;
        for (int i = 0; i < 6; i++) *--top = nullptr;
        at = top;
    }
    void leave_for(Context& next) { emulation_switch(&at, next.at); }
};
#else
struct Context {
    ucontext_t at;
    void start(char* stack, size_t size, void (*entry)()) {
        getcontext(&at);
        at.uc_stack.ss_sp = stack;
        at.uc_stack.ss_size = size;
        at.uc_link = nullptr;
        makecontext(&at, entry, 0);
    }
    void leave_for(Context& next) { swapcontext(&at, &next.at); }
};
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 1 << 18;
#else
constexpr size_t STACK_BYTES = 1 << 16;
#endif
enum class State { ready, at_warp, at_block, done };
struct Fiber {
    Context context;
    State state;
    unsigned thread;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};
struct Scheduler {
    std::mutex one_launch_at_a_time;
    std::vector<Fiber> fibers;
    std::vector<uint64_t> shared;
    std::vector<uint32_t> lanes;  // what the lanes of each warp offer to each other
    std::vector<unsigned> order;
    Context main;
    Fiber* current = nullptr;
    void (*body)(void*) = nullptr;
    void* closure = nullptr;
    uint64_t random = 0;
};
inline Scheduler scheduler;

inline void* shared_memory() { return scheduler.shared.data(); }
inline void pause(State state) {
    Fiber& me = *scheduler.current;
    me.state = state;
    me.context.leave_for(scheduler.main);
}
inline void wait_for_block() { pause(State::at_block); }
inline void wait_for_warp() { pause(State::at_warp); }
template <class T> T exchange(T value, int source) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    uint32_t* warp = &scheduler.lanes[threadIdx.x / WARP * WARP];
    memcpy(warp + threadIdx.x % WARP, &value, 4);
    wait_for_warp();
    memcpy(&value, warp + (source & 31), 4);
    wait_for_warp();
    return value;
}

inline void fiber_main() {
    scheduler.body(scheduler.closure);
    pause(State::done);
}
inline void resume(Fiber& fiber) {
    scheduler.current = &fiber;
    threadIdx = {fiber.thread, 0, 0};
    scheduler.main.leave_for(fiber.context);
}
inline unsigned draw(unsigned below) {  // xorshift64
    uint64_t& r = scheduler.random;
    r ^= r << 13, r ^= r >> 7, r ^= r << 17;
    return r % below;
}
inline void shuffle(unsigned* first, unsigned count) {
    if (scheduler.random)
        for (unsigned i = count - 1; i > 0; i--) std::swap(first[i], first[draw(i + 1)]);
}
inline unsigned count(const Fiber* first, unsigned n, State state) {
    return std::count_if(first, first + n, [=](const Fiber& f) { return f.state == state; });
}
inline void release(Fiber* first, unsigned n) {
    for (unsigned i = 0; i < n; i++) first[i].state = State::ready;
}

// Lets a warp run until it waits for the block or is done; false if it cannot.
inline bool run_warp(Fiber* warp) {
    unsigned* order = scheduler.order.data();
    for (;;) {
        shuffle(order, WARP);
        for (unsigned i = 0; i < WARP; i++)
            if (warp[order[i]].state == State::ready) resume(warp[order[i]]);
        if (count(warp, WARP, State::at_warp) != WARP) break;
        release(warp, WARP);
    }
    return count(warp, WARP, State::at_block) == WARP || count(warp, WARP, State::done) == WARP;
}
inline const char* run_block(unsigned threads) {
    Fiber* fibers = scheduler.fibers.data();
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].context.start(fibers[i].stack.get(), STACK_BYTES, fiber_main);
        fibers[i].state = State::ready;
        fibers[i].thread = i;
    }
    std::vector<unsigned> warps(threads / WARP);
    for (unsigned i = 0; i < warps.size(); i++) warps[i] = i;
    for (;;) {
        shuffle(warps.data(), warps.size());
        for (unsigned warp : warps)
            if (!run_warp(fibers + warp * WARP)) return "deadlock: lanes of a warp wait at different barriers";
        if (count(fibers, threads, State::done) == threads) return "";
        if (count(fibers, threads, State::at_block) != threads) return "deadlock: a barrier that not all threads reach";
        release(fibers, threads);
    }
}

template <class F> std::string launch(const Shape& shape, F body) {
    std::lock_guard<std::mutex> lock(scheduler.one_launch_at_a_time);
    if (scheduler.fibers.size() < shape.block) scheduler.fibers = std::vector<Fiber>(shape.block);
    scheduler.lanes.resize(shape.block);
    scheduler.order.resize(WARP);
    for (unsigned i = 0; i < WARP; i++) scheduler.order[i] = i;
    scheduler.random = shape.seed;
    scheduler.closure = &body;
    scheduler.body = [](void* closure) { (*(F*)closure)(); };
    gridDim = shape.grid, blockDim = {shape.block, 1, 1};
    for (unsigned i = 0; i < shape.blocks(); i++) {
        blockIdx = shape.block_at(i);
        scheduler.shared.assign(shape.words(), POISON);
        if (const char* trouble = run_block(shape.block); *trouble) return trouble;
    }
    return "";
}
}  // namespace emulation
