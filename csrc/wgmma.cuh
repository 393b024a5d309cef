// Hopper's asynchronous matrix products (wgmma, sm_90a), operands in shared memory K-major and swizzled as `swizzled` in
// tile.cuh lays them out, the first in shared memory or in registers. No torch here.
#pragma once

#include "ptx.cuh"

namespace structlayers {

// What was written to shared memory by ordinary stores is now visible to the tensor cores' own reads.
__device__ __forceinline__ void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until all but the last `Pending` committed groups are done.
template <int Pending = 0>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Descriptor of a tile whose rows hold KB = 32, 64 or 128 bytes of K; `address` may point 32 bytes further per k-step.
template <int KB>
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address) {
  static_assert(KB == 32 || KB == 64 || KB == 128);
  constexpr uint64_t mode = KB == 128 ? 1 : KB == 64 ? 2 : 3, group = 8 * KB;  // swizzle, bytes from eight rows to the next
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | (group >> 4) << 32 | mode << 62;
}

// Of a transposed operand of more than 64 values: every further 64 of them lie `next` bytes behind those before.
__host__ __device__ constexpr uint64_t wgmma_descriptor_wide(uint32_t address, uint32_t next) {
  return (wgmma_descriptor<128>(address) & ~(uint64_t{0x3fff} << 16)) | uint64_t{next >> 4} << 16;
}

// acc (64 x N, float32) = a (64 x 32 bytes of K) * b (N x 32 bytes of K)^T, plus acc unless `fresh`. Asynchronous.
template <typename T, int N>
struct Wgmma;

// The accumulators must be named one by one, so there is one macro for every N, for both types.

#define STRUCTLAYERS_WGMMA_8(T, TYPE)                                                                       \
template <>                                                                                                 \
struct Wgmma<T, 8> {                                                                                        \
  __device__ static __forceinline__ void multiply(float (&acc)[1][4], uint64_t a, uint64_t b, bool fresh) { \
    asm volatile(                                                                                           \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %6, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE " "                                      \
        "{%0, %1, %2, %3}, "                                                                                \
        "%4, %5, accumulate, 1, 1, 0, 0;\n}\n"                                                              \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3])                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                    \
  }                                                                                                         \
};
STRUCTLAYERS_WGMMA_8(__half, "f16")
STRUCTLAYERS_WGMMA_8(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_8

#define STRUCTLAYERS_WGMMA_16(T, TYPE)                                                                                                           \
template <>                                                                                                                                      \
struct Wgmma<T, 16> {                                                                                                                            \
  __device__ static __forceinline__ void multiply(float (&acc)[2][4], uint64_t a, uint64_t b, bool fresh) {                                      \
    asm volatile(                                                                                                                                \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %10, 0;\n"                                                                           \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " "                                                                          \
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "                                                                                                     \
        "%8, %9, accumulate, 1, 1, 0, 0;\n}\n"                                                                                                   \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                                                         \
  }                                                                                                                                              \
};
STRUCTLAYERS_WGMMA_16(__half, "f16")
STRUCTLAYERS_WGMMA_16(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_16

#define STRUCTLAYERS_WGMMA_32(T, TYPE)                                                                      \
template <>                                                                                                 \
struct Wgmma<T, 32> {                                                                                       \
  __device__ static __forceinline__ void multiply(float (&acc)[4][4], uint64_t a, uint64_t b, bool fresh) { \
    asm volatile(                                                                                           \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %18, 0;\n"                                      \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " "                                     \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                 \
        "%8, %9, %10, %11, %12, %13, %14, %15}, "                                                           \
        "%16, %17, accumulate, 1, 1, 0, 0;\n}\n"                                                            \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]),                               \
          "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),                               \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]),                               \
          "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3])                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                    \
  }                                                                                                         \
};
STRUCTLAYERS_WGMMA_32(__half, "f16")
STRUCTLAYERS_WGMMA_32(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_32

#define STRUCTLAYERS_WGMMA_48(T, TYPE)                                                                                                            \
template <>                                                                                                                                       \
struct Wgmma<T, 48> {                                                                                                                             \
  __device__ static __forceinline__ void multiply(float (&acc)[6][4], uint64_t a, uint64_t b, bool fresh) {                                       \
    asm volatile(                                                                                                                                 \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %26, 0;\n"                                                                            \
        "wgmma.mma_async.sync.aligned.m64n48k16.f32." TYPE "." TYPE " "                                                                           \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                                                       \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                                                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23}, "                                                                                               \
        "%24, %25, accumulate, 1, 1, 0, 0;\n}\n"                                                                                                  \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]), \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]), "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]), \
          "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]), "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3])  \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                                                          \
  }                                                                                                                                               \
};
STRUCTLAYERS_WGMMA_48(__half, "f16")
STRUCTLAYERS_WGMMA_48(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_48

#define STRUCTLAYERS_WGMMA_64(T, TYPE)                                                                      \
template <>                                                                                                 \
struct Wgmma<T, 64> {                                                                                       \
  __device__ static __forceinline__ void multiply(float (&acc)[8][4], uint64_t a, uint64_t b, bool fresh) { \
    asm volatile(                                                                                           \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %34, 0;\n"                                      \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "                                     \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                 \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                            \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                          \
        "%24, %25, %26, %27, %28, %29, %30, %31}, "                                                         \
        "%32, %33, accumulate, 1, 1, 0, 0;\n}\n"                                                            \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]),                               \
          "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),                               \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]),                               \
          "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]),                               \
          "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]),                               \
          "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),                               \
          "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]),                               \
          "+f"(acc[7][0]), "+f"(acc[7][1]), "+f"(acc[7][2]), "+f"(acc[7][3])                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                    \
  }                                                                                                         \
};
STRUCTLAYERS_WGMMA_64(__half, "f16")
STRUCTLAYERS_WGMMA_64(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_64

#define STRUCTLAYERS_WGMMA_96(T, TYPE)                                                                                                                   \
template <>                                                                                                                                              \
struct Wgmma<T, 96> {                                                                                                                                    \
  __device__ static __forceinline__ void multiply(float (&acc)[12][4], uint64_t a, uint64_t b, bool fresh) {                                             \
    asm volatile(                                                                                                                                        \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %50, 0;\n"                                                                                   \
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE " "                                                                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                                                              \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                                                                         \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                                                                       \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                                                                       \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                                                                       \
        "%40, %41, %42, %43, %44, %45, %46, %47}, "                                                                                                      \
        "%48, %49, accumulate, 1, 1, 0, 0;\n}\n"                                                                                                         \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),        \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]), "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]),        \
          "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]), "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),        \
          "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]), "+f"(acc[7][0]), "+f"(acc[7][1]), "+f"(acc[7][2]), "+f"(acc[7][3]),        \
          "+f"(acc[8][0]), "+f"(acc[8][1]), "+f"(acc[8][2]), "+f"(acc[8][3]), "+f"(acc[9][0]), "+f"(acc[9][1]), "+f"(acc[9][2]), "+f"(acc[9][3]),        \
          "+f"(acc[10][0]), "+f"(acc[10][1]), "+f"(acc[10][2]), "+f"(acc[10][3]), "+f"(acc[11][0]), "+f"(acc[11][1]), "+f"(acc[11][2]), "+f"(acc[11][3]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                                                                 \
  }                                                                                                                                                      \
};
STRUCTLAYERS_WGMMA_96(__half, "f16")
STRUCTLAYERS_WGMMA_96(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_96

#define STRUCTLAYERS_WGMMA_128(T, TYPE)                                                                      \
template <>                                                                                                  \
struct Wgmma<T, 128> {                                                                                       \
  __device__ static __forceinline__ void multiply(float (&acc)[16][4], uint64_t a, uint64_t b, bool fresh) { \
    asm volatile(                                                                                            \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %66, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                                     \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                  \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                             \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                           \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                           \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                           \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                                           \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                                           \
        "%56, %57, %58, %59, %60, %61, %62, %63}, "                                                          \
        "%64, %65, accumulate, 1, 1, 0, 0;\n}\n"                                                             \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]),                                \
          "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),                                \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]),                                \
          "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]),                                \
          "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]),                                \
          "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),                                \
          "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]),                                \
          "+f"(acc[7][0]), "+f"(acc[7][1]), "+f"(acc[7][2]), "+f"(acc[7][3]),                                \
          "+f"(acc[8][0]), "+f"(acc[8][1]), "+f"(acc[8][2]), "+f"(acc[8][3]),                                \
          "+f"(acc[9][0]), "+f"(acc[9][1]), "+f"(acc[9][2]), "+f"(acc[9][3]),                                \
          "+f"(acc[10][0]), "+f"(acc[10][1]), "+f"(acc[10][2]), "+f"(acc[10][3]),                            \
          "+f"(acc[11][0]), "+f"(acc[11][1]), "+f"(acc[11][2]), "+f"(acc[11][3]),                            \
          "+f"(acc[12][0]), "+f"(acc[12][1]), "+f"(acc[12][2]), "+f"(acc[12][3]),                            \
          "+f"(acc[13][0]), "+f"(acc[13][1]), "+f"(acc[13][2]), "+f"(acc[13][3]),                            \
          "+f"(acc[14][0]), "+f"(acc[14][1]), "+f"(acc[14][2]), "+f"(acc[14][3]),                            \
          "+f"(acc[15][0]), "+f"(acc[15][1]), "+f"(acc[15][2]), "+f"(acc[15][3])                             \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                     \
  }                                                                                                          \
};
STRUCTLAYERS_WGMMA_128(__half, "f16")
STRUCTLAYERS_WGMMA_128(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_128

#define STRUCTLAYERS_WGMMA_256(T, TYPE)                                                                      \
template <>                                                                                                  \
struct Wgmma<T, 256> {                                                                                       \
  __device__ static __forceinline__ void multiply(float (&acc)[32][4], uint64_t a, uint64_t b, bool fresh) { \
    asm volatile(                                                                                            \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %130, 0;\n"                                      \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "                                     \
        "{%0, %1, %2, %3, %4, %5, %6, %7, "                                                                  \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                             \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                           \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                           \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                           \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                                           \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                                           \
        "%56, %57, %58, %59, %60, %61, %62, %63, "                                                           \
        "%64, %65, %66, %67, %68, %69, %70, %71, "                                                           \
        "%72, %73, %74, %75, %76, %77, %78, %79, "                                                           \
        "%80, %81, %82, %83, %84, %85, %86, %87, "                                                           \
        "%88, %89, %90, %91, %92, %93, %94, %95, "                                                           \
        "%96, %97, %98, %99, %100, %101, %102, %103, "                                                       \
        "%104, %105, %106, %107, %108, %109, %110, %111, "                                                   \
        "%112, %113, %114, %115, %116, %117, %118, %119, "                                                   \
        "%120, %121, %122, %123, %124, %125, %126, %127}, "                                                  \
        "%128, %129, accumulate, 1, 1, 0, 0;\n}\n"                                                           \
        : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]),                                \
          "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),                                \
          "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]),                                \
          "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]),                                \
          "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]),                                \
          "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),                                \
          "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]),                                \
          "+f"(acc[7][0]), "+f"(acc[7][1]), "+f"(acc[7][2]), "+f"(acc[7][3]),                                \
          "+f"(acc[8][0]), "+f"(acc[8][1]), "+f"(acc[8][2]), "+f"(acc[8][3]),                                \
          "+f"(acc[9][0]), "+f"(acc[9][1]), "+f"(acc[9][2]), "+f"(acc[9][3]),                                \
          "+f"(acc[10][0]), "+f"(acc[10][1]), "+f"(acc[10][2]), "+f"(acc[10][3]),                            \
          "+f"(acc[11][0]), "+f"(acc[11][1]), "+f"(acc[11][2]), "+f"(acc[11][3]),                            \
          "+f"(acc[12][0]), "+f"(acc[12][1]), "+f"(acc[12][2]), "+f"(acc[12][3]),                            \
          "+f"(acc[13][0]), "+f"(acc[13][1]), "+f"(acc[13][2]), "+f"(acc[13][3]),                            \
          "+f"(acc[14][0]), "+f"(acc[14][1]), "+f"(acc[14][2]), "+f"(acc[14][3]),                            \
          "+f"(acc[15][0]), "+f"(acc[15][1]), "+f"(acc[15][2]), "+f"(acc[15][3]),                            \
          "+f"(acc[16][0]), "+f"(acc[16][1]), "+f"(acc[16][2]), "+f"(acc[16][3]),                            \
          "+f"(acc[17][0]), "+f"(acc[17][1]), "+f"(acc[17][2]), "+f"(acc[17][3]),                            \
          "+f"(acc[18][0]), "+f"(acc[18][1]), "+f"(acc[18][2]), "+f"(acc[18][3]),                            \
          "+f"(acc[19][0]), "+f"(acc[19][1]), "+f"(acc[19][2]), "+f"(acc[19][3]),                            \
          "+f"(acc[20][0]), "+f"(acc[20][1]), "+f"(acc[20][2]), "+f"(acc[20][3]),                            \
          "+f"(acc[21][0]), "+f"(acc[21][1]), "+f"(acc[21][2]), "+f"(acc[21][3]),                            \
          "+f"(acc[22][0]), "+f"(acc[22][1]), "+f"(acc[22][2]), "+f"(acc[22][3]),                            \
          "+f"(acc[23][0]), "+f"(acc[23][1]), "+f"(acc[23][2]), "+f"(acc[23][3]),                            \
          "+f"(acc[24][0]), "+f"(acc[24][1]), "+f"(acc[24][2]), "+f"(acc[24][3]),                            \
          "+f"(acc[25][0]), "+f"(acc[25][1]), "+f"(acc[25][2]), "+f"(acc[25][3]),                            \
          "+f"(acc[26][0]), "+f"(acc[26][1]), "+f"(acc[26][2]), "+f"(acc[26][3]),                            \
          "+f"(acc[27][0]), "+f"(acc[27][1]), "+f"(acc[27][2]), "+f"(acc[27][3]),                            \
          "+f"(acc[28][0]), "+f"(acc[28][1]), "+f"(acc[28][2]), "+f"(acc[28][3]),                            \
          "+f"(acc[29][0]), "+f"(acc[29][1]), "+f"(acc[29][2]), "+f"(acc[29][3]),                            \
          "+f"(acc[30][0]), "+f"(acc[30][1]), "+f"(acc[30][2]), "+f"(acc[30][3]),                            \
          "+f"(acc[31][0]), "+f"(acc[31][1]), "+f"(acc[31][2]), "+f"(acc[31][3])                             \
        : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));                                                     \
  }                                                                                                          \
};
STRUCTLAYERS_WGMMA_256(__half, "f16")
STRUCTLAYERS_WGMMA_256(__nv_bfloat16, "bf16")
#undef STRUCTLAYERS_WGMMA_256

// The same with a from registers: thread t of the warpgroup holds, in the four registers of 32 bytes of K, rows t / 4 % 8 and
// that + 8 of the 16 of its warp (registers 0, 2 and 1, 3), bytes 4 (t % 4) of the first 16 (registers 0, 1) and the second
// (2, 3). They must not change before the products are done. Transposed (16-bit): b lies in rows of K that hold up to 64 of its
// N values, in swizzled groups of eight rows as wgmma_descriptor says; for N = 128 wgmma_descriptor_wide.
template <typename T, int N, bool Transposed = false>
struct WgmmaRegisters;

#define STRUCTLAYERS_WGMMA_ACC(q) "+f"(acc[q][0]), "+f"(acc[q][1]), "+f"(acc[q][2]), "+f"(acc[q][3])

#define STRUCTLAYERS_WGMMA_REGISTERS_32(T, TYPE, K, TRANSPOSED, TAIL)                                                   \
template <>                                                                                                             \
struct WgmmaRegisters<T, 32, TRANSPOSED> {                                                                              \
  __device__ static __forceinline__ void multiply(float (&acc)[4][4], const uint32_t (&a)[4], uint64_t b, bool fresh) { \
    asm volatile(                                                                                                       \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %21, 0;\n"                                                  \
        "wgmma.mma_async.sync.aligned.m64n32" K ".f32." TYPE "." TYPE " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                                      \
        "{%16, %17, %18, %19}, %20, accumulate, 1, 1" TAIL ";\n}\n"                                                     \
        : STRUCTLAYERS_WGMMA_ACC(0), STRUCTLAYERS_WGMMA_ACC(1), STRUCTLAYERS_WGMMA_ACC(2), STRUCTLAYERS_WGMMA_ACC(3)    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(fresh)));                            \
  }                                                                                                                     \
};
STRUCTLAYERS_WGMMA_REGISTERS_32(__half, "f16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_32(__half, "f16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_32(__nv_bfloat16, "bf16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_32(__nv_bfloat16, "bf16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_32(float, "tf32", "k8", false, "")
#undef STRUCTLAYERS_WGMMA_REGISTERS_32

#define STRUCTLAYERS_WGMMA_REGISTERS_48(T, TYPE, K, TAIL)                                                                  \
template <>                                                                                                                \
struct WgmmaRegisters<T, 48> {                                                                                             \
  __device__ static __forceinline__ void multiply(float (&acc)[6][4], const uint32_t (&a)[4], uint64_t b, bool fresh) {    \
    asm volatile(                                                                                                          \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %29, 0;\n"                                                     \
        "wgmma.mma_async.sync.aligned.m64n48" K ".f32." TYPE "." TYPE " "                                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}, " \
        "{%24, %25, %26, %27}, %28, accumulate, 1, 1" TAIL ";\n}\n"                                                        \
        : STRUCTLAYERS_WGMMA_ACC(0), STRUCTLAYERS_WGMMA_ACC(1), STRUCTLAYERS_WGMMA_ACC(2), STRUCTLAYERS_WGMMA_ACC(3),      \
          STRUCTLAYERS_WGMMA_ACC(4), STRUCTLAYERS_WGMMA_ACC(5)                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(fresh)));                               \
  }                                                                                                                        \
};
STRUCTLAYERS_WGMMA_REGISTERS_48(__half, "f16", "k16", ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_48(__nv_bfloat16, "bf16", "k16", ", 0")
#undef STRUCTLAYERS_WGMMA_REGISTERS_48

#define STRUCTLAYERS_WGMMA_REGISTERS_64(T, TYPE, K, TRANSPOSED, TAIL)                                                   \
template <>                                                                                                             \
struct WgmmaRegisters<T, 64, TRANSPOSED> {                                                                              \
  __device__ static __forceinline__ void multiply(float (&acc)[8][4], const uint32_t (&a)[4], uint64_t b, bool fresh) { \
    asm volatile(                                                                                                       \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %37, 0;\n"                                                  \
        "wgmma.mma_async.sync.aligned.m64n64" K ".f32." TYPE "." TYPE " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                             \
        "{%32, %33, %34, %35}, %36, accumulate, 1, 1" TAIL ";\n}\n"                                                     \
        : STRUCTLAYERS_WGMMA_ACC(0), STRUCTLAYERS_WGMMA_ACC(1), STRUCTLAYERS_WGMMA_ACC(2), STRUCTLAYERS_WGMMA_ACC(3),   \
          STRUCTLAYERS_WGMMA_ACC(4), STRUCTLAYERS_WGMMA_ACC(5), STRUCTLAYERS_WGMMA_ACC(6), STRUCTLAYERS_WGMMA_ACC(7)    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(fresh)));                            \
  }                                                                                                                     \
};
STRUCTLAYERS_WGMMA_REGISTERS_64(__half, "f16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_64(__half, "f16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_64(__nv_bfloat16, "bf16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_64(__nv_bfloat16, "bf16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_64(float, "tf32", "k8", false, "")
#undef STRUCTLAYERS_WGMMA_REGISTERS_64

#define STRUCTLAYERS_WGMMA_REGISTERS_128(T, TYPE, K, TRANSPOSED, TAIL)                                                   \
template <>                                                                                                              \
struct WgmmaRegisters<T, 128, TRANSPOSED> {                                                                              \
  __device__ static __forceinline__ void multiply(float (&acc)[16][4], const uint32_t (&a)[4], uint64_t b, bool fresh) { \
    asm volatile(                                                                                                        \
        "{\n.reg .pred accumulate;\nsetp.eq.s32 accumulate, %69, 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n128" K ".f32." TYPE "." TYPE " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                               \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                              \
        "{%64, %65, %66, %67}, %68, accumulate, 1, 1" TAIL ";\n}\n"                                                      \
        : STRUCTLAYERS_WGMMA_ACC(0), STRUCTLAYERS_WGMMA_ACC(1), STRUCTLAYERS_WGMMA_ACC(2), STRUCTLAYERS_WGMMA_ACC(3),    \
          STRUCTLAYERS_WGMMA_ACC(4), STRUCTLAYERS_WGMMA_ACC(5), STRUCTLAYERS_WGMMA_ACC(6), STRUCTLAYERS_WGMMA_ACC(7),    \
          STRUCTLAYERS_WGMMA_ACC(8), STRUCTLAYERS_WGMMA_ACC(9), STRUCTLAYERS_WGMMA_ACC(10), STRUCTLAYERS_WGMMA_ACC(11),  \
          STRUCTLAYERS_WGMMA_ACC(12), STRUCTLAYERS_WGMMA_ACC(13), STRUCTLAYERS_WGMMA_ACC(14), STRUCTLAYERS_WGMMA_ACC(15) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(fresh)));                             \
  }                                                                                                                      \
};
STRUCTLAYERS_WGMMA_REGISTERS_128(__half, "f16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_128(__half, "f16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_128(__nv_bfloat16, "bf16", "k16", false, ", 0")
STRUCTLAYERS_WGMMA_REGISTERS_128(__nv_bfloat16, "bf16", "k16", true, ", 1")
STRUCTLAYERS_WGMMA_REGISTERS_128(float, "tf32", "k8", false, "")
#undef STRUCTLAYERS_WGMMA_REGISTERS_128

#undef STRUCTLAYERS_WGMMA_ACC

}  // namespace structlayers
