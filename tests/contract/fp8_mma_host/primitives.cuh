// Stand-ins for negative_results/fp8_mma/primitives.cuh on a CPU, by the PTX ISA's words on fragments, ldmatrix and cp.async: a
// thread for each of a block's threads. A copy is made as late as its wait allows, so a wait that comes too late, or a stage
// that is overwritten too early, shows in the result; a read beyond a matrix ends the program.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(threads, blocks)
#define __restrict__
#define __shared__ static

struct Index {
    int x;
};
inline Index blockIdx;
inline thread_local Index threadIdx;

struct int2 {
    int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
using std::min;

constexpr int kLanes = 32, kWarps = WARPS_M * WARPS_N;
inline std::barrier<> block_barrier(kLanes *kWarps);
inline void __syncthreads() { block_barrier.arrive_and_wait(); }

// What the lanes of one warp show each other; all 32 come here for every instruction of the warp.
struct Warp {
    std::barrier<> barrier{kLanes};
    uint32_t a[kLanes][4], b[kLanes][2], address[kLanes];
};
inline Warp warps[kWarps];

inline const uint8_t *shared_memory = nullptr;  // addresses count from here
inline uint32_t shared_address(const void *pointer) {
    block_barrier.arrive_and_wait();
    if (threadIdx.x == 0) {
        shared_memory = static_cast<const uint8_t *>(pointer);
        std::memset(const_cast<void *>(pointer), 0x7F, STAGES * (TILE_M + TILE_N) * TILE_K);  // NaN where nothing is copied
    }
    block_barrier.arrive_and_wait();
    return 0;
}

struct Copy {
    uint32_t shared;
    const uint8_t *global;
    int bytes;
};
inline thread_local std::vector<std::vector<Copy>> groups(1);
struct Memory {
    const uint8_t *begin, *end;
};
inline std::vector<Memory> readable;  // filled by main
inline void copy_chunk(uint32_t shared, const uint8_t *global, int bytes) {
    const auto holds = [&](const Memory &memory) { return memory.begin <= global && global + bytes <= memory.end; };
    if (bytes != 0 && std::none_of(readable.begin(), readable.end(), holds)) {
        std::abort();
    }
    groups.back().push_back({shared, global, bytes});
}
inline void close_group() { groups.emplace_back(); }

template <int kPending>
void wait_for_groups() {
    while (groups.size() > kPending + 1) {  // the last one is still open
        for (const Copy &copy : groups.front()) {
            uint8_t *target = const_cast<uint8_t *>(shared_memory) + copy.shared;
            std::memset(target, 0, 16);
            std::memcpy(target, copy.global, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

inline void load_fragments(uint32_t (&r)[4], uint32_t address) {
    Warp &warp = warps[threadIdx.x / kLanes];
    const int lane = threadIdx.x % kLanes;
    warp.address[lane] = address;
    warp.barrier.arrive_and_wait();
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&r[matrix], shared_memory + warp.address[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
    }
    warp.barrier.arrive_and_wait();
}

inline double decoded(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) {
        return NAN;
    }
    const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code >> 7 ? -size : size;
}
inline uint8_t byte_of(uint32_t word, int index) { return word >> 8 * index & 255; }

inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp &warp = warps[threadIdx.x / kLanes];
    const int lane = threadIdx.x % kLanes;
    std::memcpy(warp.a[lane], a, sizeof(a));
    std::memcpy(warp.b[lane], b, sizeof(b));
    warp.barrier.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 32; ++k) {
            const int quarter = k % 16 / 4, half = k / 16;
            const uint32_t of_a = warp.a[row % 8 * 4 + quarter][row / 8 + 2 * half], of_b = warp.b[col * 4 + quarter][half];
            sum += decoded(byte_of(of_a, k % 4)) * decoded(byte_of(of_b, k % 4));
        }
        c[i] = static_cast<float>(sum);
    }
    warp.barrier.arrive_and_wait();
}

inline void store_pair(float *out, float one, float other) { out[0] = one, out[1] = other; }
inline float __fmul_rn(float one, float other) { return one * other; }
