// C [M, N] = A [M, K] B [N, K]^T * scale_a [M] * scale_b [N]; A and B are e4m3 with contiguous K, a multiple of 16.
//
// A block of eight warps makes one tile of C. Tiles of A and B come through a ring of shared memory with cp.async, fragments
// with ldmatrix, products with mma.sync m16n8k32. Sizes come from negative_results/fp8_mma/mma.py, as macros.

#include <cstdint>

#include "primitives.cuh"

constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 32;
constexpr int kChunk = 16;  // bytes: one cp.async, one row of an ldmatrix
constexpr int kChunks = TILE_K / kChunk;
constexpr int kThreads = 32 * WARPS_M * WARPS_N;
constexpr int kRows = TILE_M / WARPS_M / kMmaM;  // products of one warp, down
constexpr int kCols = TILE_N / WARPS_N / kMmaN;  // and across
constexpr int kStageBytes = (TILE_M + TILE_N) * TILE_K;

static_assert(TILE_K == 64, "the swizzle is for rows of four chunks");
static_assert(kCols % 2 == 0, "one ldmatrix brings B for two products");
static_assert(TILE_M % (WARPS_M * kMmaM) == 0 && TILE_N % (WARPS_N * kMmaN) == 0 && STAGES >= 2, "tiles are whole");

// Ada's e4m3 products keep 13 bits of the sum, and cut off the rest at every step; so there a sum stays in the tensor core
// for TILE_K products only, and is added in fp32 outside.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 890
constexpr bool kPromotes = true;
#else
constexpr bool kPromotes = false;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
constexpr int kBlocksPerSm = 1;  // twice the sums there, or e4m3 widened to fp16: more than 128 registers a thread
#else
constexpr int kBlocksPerSm = 2;
#endif

// Where a chunk of a tile's row lies. Eight rows of one chunk fall on all 32 banks, which ldmatrix reads at once.
__device__ __forceinline__ uint32_t offset_of(int row, int chunk) {
    return row * TILE_K + kChunk * (chunk ^ ((row >> 1) & 3));
}

// Rows [first, first + kTileRows) and bytes [k, k + TILE_K) of a matrix [rows, K]; zeros beyond its ends.
template <int kTileRows>
__device__ __forceinline__ void copy_tile(uint32_t shared, const uint8_t *matrix, int first, int rows, int k, int K) {
#pragma unroll
    for (int index = threadIdx.x; index < kTileRows * kChunks; index += kThreads) {
        const int row = index / kChunks, chunk = index % kChunks;
        const bool inside = first + row < rows && k + kChunk * chunk < K;
        const int64_t offset = inside ? static_cast<int64_t>(first + row) * K + k + kChunk * chunk : 0;
        copy_chunk(shared + offset_of(row, chunk), matrix + offset, inside ? kChunk : 0);
    }
}

// Adds the products of one tile of A and B, as they lie in shared memory, to a warp's part of the sums.
__device__ __forceinline__ void multiply_tile(float (&sums)[kRows][kCols][4], uint32_t tile_a, uint32_t tile_b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_a = warp / WARPS_N * (TILE_M / WARPS_M) + lane % 16;
    const int row_b = warp % WARPS_N * (TILE_N / WARPS_N) + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < TILE_K / kMmaK; ++step) {
        uint32_t a[kRows][4], b[kCols][2];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            load_fragments(a[i], tile_a + offset_of(row_a + kMmaM * i, 2 * step + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kCols; j += 2) {
            uint32_t pair[4];
            load_fragments(pair, tile_b + offset_of(row_b + kMmaN * j, 2 * step + lane / 8 % 2));
            b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kCols; ++j) {
                multiply(sums[i][j], a[i], b[j]);
            }
        }
    }
}

// Each sum times its row's scale, then times its column's, each rounded to fp32; then rounded to Out.
template <typename Out>
__device__ __forceinline__ void store_sums(const float (&sums)[kRows][kCols][4], Out *out, const float *scale_a,
                                           const float *scale_b, int tile_row, int tile_col, int M, int N) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = tile_row + warp / WARPS_N * (TILE_M / WARPS_M) + lane / 4;
    const int col = tile_col + warp % WARPS_N * (TILE_N / WARPS_N) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {  // a fragment has two rows, eight apart
        const int m = row + 8 * i;
        if (m >= M) {
            break;
        }
        const float of_row = scale_a[m];
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
            const int n = col + kMmaN * j;
            if (n < N) {  // N is even, so both columns are inside
                const float *pair = &sums[i / 2][j][i % 2 * 2];
                store_pair(out + static_cast<int64_t>(m) * N + n, __fmul_rn(__fmul_rn(pair[0], of_row), scale_b[n]),
                           __fmul_rn(__fmul_rn(pair[1], of_row), scale_b[n + 1]));
            }
        }
    }
}

// Tiles in an order in which blocks that run together share rows of A and of B in L2: GROUP_M tiles down, then across.
__device__ __forceinline__ int2 tile_of(int block, int tiles_m, int tiles_n) {
    const int first = block / (GROUP_M * tiles_n) * GROUP_M, within = block % (GROUP_M * tiles_n);
    const int height = min(tiles_m - first, GROUP_M);
    return make_int2(first + within % height, within / height);
}

template <typename Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    product_kernel(const uint8_t *__restrict__ a, const uint8_t *__restrict__ b, const float *__restrict__ scale_a,
                   const float *__restrict__ scale_b, Out *__restrict__ out, int M, int N, int K) {
    alignas(128) __shared__ uint8_t ring[STAGES * kStageBytes];
    const int2 tile = tile_of(blockIdx.x, (M + TILE_M - 1) / TILE_M, (N + TILE_N - 1) / TILE_N);
    const int first_m = tile.x * TILE_M, first_n = tile.y * TILE_N, tiles_k = (K + TILE_K - 1) / TILE_K;
    const uint32_t base = shared_address(ring);

    auto copy_stage = [&](int index) {  // one group even where nothing is left, so that groups can be counted
        if (index < tiles_k) {
            const uint32_t stage = base + index % STAGES * kStageBytes;
            copy_tile<TILE_M>(stage, a, first_m, M, index * TILE_K, K);
            copy_tile<TILE_N>(stage + TILE_M * TILE_K, b, first_n, N, index * TILE_K, K);
        }
        close_group();
    };

    float sums[kRows][kCols][4] = {};
    for (int index = 0; index < STAGES - 1; ++index) {
        copy_stage(index);
    }
    for (int index = 0; index < tiles_k; ++index) {
        wait_for_groups<STAGES - 2>();
        __syncthreads();  // this stage is there for all warps, and all have read the one that is filled next
        copy_stage(index + STAGES - 1);
        const uint32_t stage = base + index % STAGES * kStageBytes;
        if constexpr (kPromotes) {
            float part[kRows][kCols][4] = {};
            multiply_tile(part, stage, stage + TILE_M * TILE_K);
#pragma unroll
            for (int i = 0; i < kRows * kCols * 4; ++i) {
                (&sums[0][0][0])[i] += (&part[0][0][0])[i];
            }
        } else {
            multiply_tile(sums, stage, stage + TILE_M * TILE_K);
        }
    }
    store_sums(sums, out, scale_a, scale_b, first_m, first_n, M, N);
}

#ifdef __CUDACC__  // a compiler for the host, with primitives of its own, can't launch
// Called through ctypes with `blocks` from mma.py. Returns a cudaError_t, 0 for success.
extern "C" int isoloss_fp8_product(const void *a, const void *b, const void *scale_a, const void *scale_b, void *out, int M,
                                   int N, int K, int blocks, int out_is_fp32, void *stream) {
    const auto codes_a = static_cast<const uint8_t *>(a), codes_b = static_cast<const uint8_t *>(b);
    const auto of_rows = static_cast<const float *>(scale_a), of_cols = static_cast<const float *>(scale_b);
    const auto queue = static_cast<cudaStream_t>(stream);
    if (out_is_fp32) {
        const auto target = static_cast<float *>(out);
        product_kernel<<<blocks, kThreads, 0, queue>>>(codes_a, codes_b, of_rows, of_cols, target, M, N, K);
    } else {
        const auto target = static_cast<__nv_bfloat16 *>(out);
        product_kernel<<<blocks, kThreads, 0, queue>>>(codes_a, codes_b, of_rows, of_cols, target, M, N, K);
    }
    return cudaGetLastError();
}
#endif
