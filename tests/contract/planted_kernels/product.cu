// One m16n8k32 product of e4m3 numbers, and a kernel with another name beside it.
__device__ void multiply(float *c, const unsigned *a, const unsigned *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int ROWS>
__global__ void product(float *out, const unsigned *a, const unsigned *b) {
    __shared__ float sums[32];
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply(c, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
    sums[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
    __syncthreads();
    out[threadIdx.x] = sums[31 - threadIdx.x];
}

template __global__ void product<16>(float *, const unsigned *, const unsigned *);

__global__ void nothing(float *out) {
    out[threadIdx.x] = 0.0f;
}
