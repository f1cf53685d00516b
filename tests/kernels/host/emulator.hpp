// Runs a Metal kernel body on the host, one fiber a GPU thread, so that a machine without a GPU executes the text that
// Metal and CUDA compile. What a GPU leaves open is made worst: threadgroup memory starts as NaN, simdgroups and lanes
// run in an order the caller picks, and every access to threadgroup memory is checked for races: two threads, no
// barrier between, at least one writing. Memory outside an array faults (the caller puts guard pages around it).
// Cost: a context switch (about 20 ns) for each thread at each barrier and simdgroup operation; arithmetic at full speed.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "switch.hpp"

typedef unsigned int uint;

struct uint3 {
    uint x, y, z;
};

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        uint32_t u;
        memcpy(&u, &value, 4);
        bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = nan ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
    }
    explicit operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &u, 4);
        return value;
    }
};
typedef _Float16 float16_t;

namespace emulator {

constexpr size_t stack_bytes = 48 * 1024;
constexpr int max_threads = 1024;
constexpr size_t shared_limit = 32 * 1024;  // of a threadgroup on Apple GPUs

enum class State : uint8_t { ready, in_simd, at_barrier, done };
enum class Op : uint8_t { none, sum_float, max_float, sum_uint, max_uint };

struct Fiber {
    void* sp;
    State state;
    Op op;
    int site;
    union {
        float f;
        uint u;
    };
};

// One word of threadgroup memory: its value, and who touched it since the last barrier.
struct Word {
    uint value;
    uint write_epoch, read_epoch;
    int writer, reader;  // thread, -2 for several
    bool atomic_write;
};

struct Array {
    const char* name;
    Word* words;
    size_t count;
};

struct Group {
    Fiber fibers[max_threads];
    Array arrays[32];
    int num_arrays, num_threads, current;
    uint epoch;
    uint3 position, threads;
    void* scheduler;
    void (*body)();
    bool failed;
    char message[256];
    unsigned long long barriers, races_checked;
};

inline Group G;
inline char* stacks;
inline void* fault_stack;

[[noreturn]] inline void fail(const char* format, const char* name = "", long a = 0, long b = 0) {
    if (!G.failed) snprintf(G.message, sizeof G.message, format, name, a, b);
    G.failed = true;
    void* ignored;
    emulator_switch(&ignored, G.scheduler);
    abort();
}

inline void yield(State state, Op op, int site) {
    Fiber& me = G.fibers[G.current];
    me.state = state;
    me.op = op;
    me.site = site;
    emulator_switch(&me.sp, G.scheduler);
}

// `site` numbers the place in the text that waits; return addresses would not do, as compilers copy calls.
inline void barrier(int site) { yield(State::at_barrier, Op::none, site); }

inline float simd(Op op, float value, int site) {
    G.fibers[G.current].f = value;
    yield(State::in_simd, op, site);
    return G.fibers[G.current].f;
}
inline uint simd(Op op, uint value, int site) {
    G.fibers[G.current].u = value;
    yield(State::in_simd, op, site);
    return G.fibers[G.current].u;
}

inline void enter() {
    G.body();
    yield(State::done, Op::none, 0);
    abort();
}

inline Array& allocate(const char* name, size_t count) {
    for (int i = 0; i < G.num_arrays; i++)
        if (!strcmp(G.arrays[i].name, name)) return G.arrays[i];
    size_t used = count * 4;
    for (int i = 0; i < G.num_arrays; i++) used += G.arrays[i].count * 4;
    if (used > shared_limit) fail("threadgroup array %s: %ld bytes in all, at most %ld", name, long(used), long(shared_limit));
    Array& a = G.arrays[G.num_arrays++];
    a = {name, static_cast<Word*>(malloc(count * sizeof(Word))), count};
    for (size_t i = 0; i < count; i++) a.words[i] = {0xffffffffu, 0, 0, -1, -1, false};
    return a;
}

inline Word& touch(Array& a, size_t index, bool write, bool atomic) {
    if (index >= a.count) fail("threadgroup array %s: index %ld outside its %ld elements", a.name, long(index), long(a.count));
    Word& w = a.words[index];
    G.races_checked++;
    bool foreign_write = w.write_epoch == G.epoch && w.writer != G.current;
    bool foreign_read = w.read_epoch == G.epoch && w.reader != G.current;
    if ((foreign_write && !(atomic && w.atomic_write)) || (write && foreign_read))
        fail("threadgroup array %s: race at element %ld (barrier number %ld)", a.name, long(index), long(G.epoch));
    if (write) {
        w.writer = w.write_epoch == G.epoch && w.writer != G.current ? -2 : G.current;
        w.write_epoch = G.epoch;
        w.atomic_write = atomic;
    } else {
        w.reader = w.read_epoch == G.epoch && w.reader != G.current ? -2 : G.current;
        w.read_epoch = G.epoch;
    }
    return w;
}

template <typename T>
struct Cell {
    Array* array;
    size_t index;
    operator T() const {
        T value;
        memcpy(&value, &touch(*array, index, false, false).value, 4);
        return value;
    }
    void operator=(T value) const { memcpy(&touch(*array, index, true, false).value, &value, 4); }
    void operator=(const Cell& other) const { *this = T(other); }
};

template <typename T>
struct Shared {
    Array* array;
    Cell<T> operator[](size_t index) const { return {array, index}; }
};

inline bool resolve_simd(int first, int last) {
    Op op = Op::none;
    int site = 0, waiting = 0;
    for (int i = first; i < last; i++) {
        Fiber& f = G.fibers[i];
        if (f.state != State::in_simd) continue;
        if (waiting++ && (f.op != op || f.site != site)) {
            snprintf(G.message, sizeof G.message, "simdgroup of thread %d: lanes wait in different operations", first);
            return !(G.failed = true);
        }
        op = f.op;
        site = f.site;
    }
    if (!waiting) return false;
    if (waiting != 32) {
        snprintf(G.message, sizeof G.message, "simdgroup of thread %d: %d of 32 lanes reached an operation", first, waiting);
        return !(G.failed = true);
    }
    Fiber* f = G.fibers + first;
    for (int d = 16; d; d >>= 1) {
        Fiber old[32];
        memcpy(old, f, sizeof old);
        for (int i = 0; i < 32; i++) {
            const Fiber& o = old[i ^ d];
            if (op == Op::sum_float) f[i].f += o.f;
            if (op == Op::max_float) f[i].f = fmaxf(f[i].f, o.f);
            if (op == Op::sum_uint) f[i].u += o.u;
            if (op == Op::max_uint) f[i].u = f[i].u > o.u ? f[i].u : o.u;
        }
    }
    for (int i = 0; i < 32; i++) f[i].state = State::ready;
    return true;
}

inline uint64_t random_state;
inline uint random_below(uint n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return uint(random_state >> 33) % n;
}

// 0 ascending, 1 descending, from 2 on random with that seed.
inline void make_order(int* order, int n, int schedule) {
    for (int i = 0; i < n; i++) order[i] = schedule == 1 ? n - 1 - i : i;
    for (int i = n - 1; schedule >= 2 && i > 0; i--) {
        int j = int(random_below(uint(i + 1))), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

inline void run_simdgroup(int first, int schedule) {
    int lanes[32];
    do {
        make_order(lanes, 32, schedule);
        for (int l : lanes) {
            if (G.fibers[first + l].state != State::ready) continue;
            G.current = first + l;
            emulator_switch(&G.scheduler, G.fibers[first + l].sp);
            if (G.failed) return;
        }
    } while (resolve_simd(first, first + 32) && !G.failed);
}

inline void run_group(uint3 position, uint3 threads, void (*body)(), int schedule) {
    G.position = position;
    G.threads = threads;
    G.body = body;
    G.num_threads = int(threads.x);
    G.epoch = 1;
    G.num_arrays = 0;
    for (int i = 0; i < G.num_threads; i++)
        G.fibers[i] = {prepare_stack(stacks + (i + 1) * stack_bytes, enter), State::ready, Op::none, 0, {0.0f}};
    int groups[max_threads / 32], n = G.num_threads / 32;
    for (bool finished = false; !finished && !G.failed; G.epoch++) {
        make_order(groups, n, schedule);
        for (int i = 0; i < n && !G.failed; i++) run_simdgroup(groups[i] * 32, schedule);
        if (G.failed) break;
        int waiting = 0, site = 0;
        for (int i = 0; i < G.num_threads; i++) {
            if (G.fibers[i].state != State::at_barrier) continue;
            if (waiting++ && G.fibers[i].site != site) {
                snprintf(G.message, sizeof G.message, "threads wait at different barriers (thread %d)", i);
                G.failed = true;
            }
            site = G.fibers[i].site;
            G.fibers[i].state = State::ready;
        }
        finished = waiting == 0;
        G.barriers += waiting != 0;
        if (waiting != 0 && waiting != G.num_threads) {
            snprintf(G.message, sizeof G.message, "%d of %d threads reached a barrier", waiting, G.num_threads);
            G.failed = true;
        }
    }
    for (int i = 0; i < G.num_arrays; i++) free(G.arrays[i].words);
}

inline void on_fault(int, siginfo_t* info, void*) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGSEGV);
    sigaddset(&set, SIGBUS);
    sigprocmask(SIG_UNBLOCK, &set, nullptr);
    snprintf(G.message, sizeof G.message, "thread %d of threadgroup %u touched memory outside its arrays (%p)", G.current,
             G.position.x, info->si_addr);
    G.failed = true;
    void* ignored;
    emulator_switch(&ignored, G.scheduler);
}

// Runs a grid of threads (x only). Returns null, or what went wrong.
inline const char* launch(void (*body)(), uint grid, uint threads, int schedule) {
    if (threads % 32 || threads > max_threads || grid % 32) return "threads must come in whole simdgroups, at most 1024";
    if (!stacks) {
        stacks = static_cast<char*>(mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        fault_stack = malloc(64 * 1024);
    }
    stack_t alternative = {}, old_stack;
    alternative.ss_sp = fault_stack;
    alternative.ss_size = 64 * 1024;
    sigaltstack(&alternative, &old_stack);
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    G.failed = false;
    G.barriers = G.races_checked = 0;
    random_state = uint64_t(schedule) * 0x9e3779b97f4a7c15ull + 1;
    uint groups = (grid + threads - 1) / threads;
    for (uint i = 0; i < groups && !G.failed; i++) {
        uint g = schedule == 1 ? groups - 1 - i : i;
        uint left = grid - g * threads;
        run_group({g, 0, 0}, {left < threads ? left : threads, 1, 1}, body, schedule);
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    if (!(old_stack.ss_flags & SS_DISABLE)) sigaltstack(&old_stack, nullptr);
    return G.failed ? G.message : nullptr;
}

}  // namespace emulator
