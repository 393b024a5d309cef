// float32 as two TF32 numbers, and sums of products kept outside of the tensor core: what the float32 kernels on wgmma share.
#pragma once

#include <cstdint>

namespace structlayers {

// To the nearest number of 10 bits; what is left is exact, and NaN where the number is.
__device__ __forceinline__ uint32_t upper_part(uint32_t v) { return (v + 0x1000u) & 0xffffe000u; }
__device__ __forceinline__ uint32_t lower_part(uint32_t v, uint32_t upper) {
  return __float_as_uint(__uint_as_float(v) - __uint_as_float(upper));
}

// For the tensor core, which cuts off what is behind the 10 bits: half of the last rounds to nearest. NaN stays NaN: the one that
// GPUs make, 0x7fffffff, would become -0. No predicate, which would serialise the products that follow (C7513).
__device__ __forceinline__ uint32_t rounded_by_cutting(uint32_t v) {
  const int positive = min(static_cast<int>(v), 0x7fffefff);
  return min(static_cast<uint32_t>(positive), 0xffffefffu) + 0x1000u;
}

// Accumulators of every l, [l][8 columns][4].
template <int L, int Groups>
__device__ __forceinline__ void clear_sums(float (&acc)[L][Groups][4]) {
#pragma unroll
  for (int l = 0; l < L; ++l)
#pragma unroll
    for (int g = 0; g < Groups; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[l][g][e] = 0.f;
}

// Adds sums of a few products, rounded to nearest, where the tensor core would cut off.
template <int Groups>
__device__ __forceinline__ void promote(float (&acc)[Groups][4], const float (&partial)[Groups][4]) {
#pragma unroll
  for (int g = 0; g < Groups; ++g)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[g][e] += partial[g][e];
}

}  // namespace structlayers
