// What the tensor-core kernels share: shared-memory addressing, the transpose between interleaved and separate blocks,
// one k-step of matrix products, and the epilogue of one number. No torch here.
#pragma once

#include "product.h"
#include "ptx.cuh"

namespace structlayers {

// Byte offset of 16-byte piece `chunk` of `row` in a tile whose rows hold `Chunks` pieces (1, 2, 4 or 8). The pieces of
// eight neighbouring rows at one chunk fall in eight different bank groups, as ldmatrix wants.
template <int Chunks>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  static_assert(Chunks == 1 || Chunks == 2 || Chunks == 4 || Chunks == 8);
  return static_cast<uint32_t>((row * Chunks + (chunk ^ ((row / (8 / Chunks)) & (Chunks - 1)))) * 16);
}

// A transpose unit: E = 16 / sizeof(element) neighbours along k (or j) times G neighbours along l. Interleaved, as in
// global memory: flat position k * G + l. Separate: for every l, the E values of k in 16 bytes.
template <int Size, int G>
struct TransposeUnit {
  static constexpr int E = 16 / Size;

  __device__ static __forceinline__ void separate(const uint32_t (&flat)[G * 4], uint32_t (&out)[G][4]) {
    if constexpr (Size == 4) {
#pragma unroll
      for (int l = 0; l < G; ++l)
#pragma unroll
        for (int k = 0; k < 4; ++k) out[l][k] = flat[k * G + l];
    } else {
#pragma unroll
      for (int l = 0; l < G; ++l)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int p = 2 * m * G + l, q = p + G;
          out[l][m] = __byte_perm(flat[p / 2], flat[q / 2], (q % 2 ? 0x7600 : 0x5400) | (p % 2 ? 0x32 : 0x10));
        }
    }
  }

  __device__ static __forceinline__ void interleave(const uint32_t (&in)[G][4], uint32_t (&flat)[G * 4]) {
    if constexpr (Size == 4) {
#pragma unroll
      for (int l = 0; l < G; ++l)
#pragma unroll
        for (int k = 0; k < 4; ++k) flat[k * G + l] = in[l][k];
    } else {
#pragma unroll
      for (int m = 0; m < G * 4; ++m) {
        const int p = 2 * m, q = p + 1;
        const int pk = p / G, pl = p % G, qk = q / G, ql = q % G;
        flat[m] = __byte_perm(in[pl][pk / 2], in[ql][qk / 2], (qk % 2 ? 0x7600 : 0x5400) | (pk % 2 ? 0x32 : 0x10));
      }
    }
  }
};

// One k-step (32 bytes of K) of a 16 x 8 tile. Split: float32 operands as sums of two TF32 numbers, three products, and
// the partial sum promoted to a float32 register, since the tensor core truncates when it accumulates.
template <typename T, bool Split>
struct Operand {
  uint32_t v[4];
};

template <>
struct Operand<float, true> {
  uint32_t v[4];
  uint32_t low[4];
};

template <typename T, bool Split>
__device__ __forceinline__ void prepare(Operand<T, Split>& operand) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t exact = operand.v[r];
      operand.v[r] = round_to_tf32(exact);
      if constexpr (Split) {
        operand.low[r] = round_to_tf32(__float_as_uint(__uint_as_float(exact) - __uint_as_float(operand.v[r])));
      }
    }
  }
}

template <typename T, bool Split>
__device__ __forceinline__ void step(float (&acc)[4], const Operand<T, Split>& a, const Operand<T, Split>& b, int half) {
  if constexpr (Split) {
    float partial[4] = {0.f, 0.f, 0.f, 0.f};
    multiply_add<T>(partial, a.low, b.v + 2 * half);
    multiply_add<T>(partial, a.v, b.low + 2 * half);
    multiply_add<T>(partial, a.v, b.v + 2 * half);
#pragma unroll
    for (int r = 0; r < 4; ++r) acc[r] += partial[r];
  } else {
    multiply_add<T>(acc, a.v, b.v + 2 * half);
  }
}

template <typename T>
__device__ __forceinline__ float to_float(T v) {
  if constexpr (sizeof(T) == 4) return v;
  else if constexpr (std::is_same_v<T, __half>) return __half2float(v);
  else return __bfloat162float(v);
}

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == 4) return v;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  else return __float2bfloat16_rn(v);
}

template <typename T>
__device__ __forceinline__ uint32_t pack_two(float v0, float v1) {
  static_assert(sizeof(T) == 2);
  const T t0 = from_float<T>(v0), t1 = from_float<T>(v1);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&t0)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&t1)) << 16;
}

// Out of line: unrolled over an accumulator tile, the four functions would not fit the instruction cache.
static __device__ __noinline__ float activate(float z, int activation) {
  switch (activation) {
    case kRelu: return z < 0.f ? 0.f : z;  // NaN stays NaN
    case kGelu: return 0.5f * z * (1.f + erff(z * 0.70710678118654752f));
    case kGeluTanh: return 0.5f * z * (1.f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case kSilu: return z / (1.f + __expf(-z));
    default: return z;
  }
}

// erf(z / sqrt(2)) by a logistic function of an odd polynomial: GELU to 3e-5 of max(|z|, 1), far below 16-bit rounding, and
// relatively accurate in the left tail.
__device__ __forceinline__ float gelu_16bit(float z) {
  const float s = fminf(z * z, 36.f);
  const float u = z * fmaf(s, fmaf(s, 1.11995629e-3f, -0.107450145f), -2.30059679f);
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(u));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
  return z * r;
}

template <typename T, int Activation>
__device__ __forceinline__ uint32_t activate_two(uint32_t v) {
  float2 z;
  if constexpr (std::is_same_v<T, __half>) z = __half22float2(reinterpret_cast<const __half2&>(v));
  else z = make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  if constexpr (Activation == kGelu) return pack_two<T>(gelu_16bit(z.x), gelu_16bit(z.y));
  else if constexpr (Activation == kRelu) return pack_two<T>(z.x < 0.f ? 0.f : z.x, z.y < 0.f ? 0.f : z.y);
  else return pack_two<T>(activate(z.x, Activation), activate(z.y, Activation));
}

// Eight values of 16 bits, after their rounding. Out of line once for all of them: inline it would cost the accumulators
// their registers.
template <typename T>
__device__ __noinline__ uint4 activated(uint4 v, int activation) {
  switch (activation) {
    case kGelu:
      return make_uint4(activate_two<T, kGelu>(v.x), activate_two<T, kGelu>(v.y), activate_two<T, kGelu>(v.z), activate_two<T, kGelu>(v.w));
    case kRelu:
      return make_uint4(activate_two<T, kRelu>(v.x), activate_two<T, kRelu>(v.y), activate_two<T, kRelu>(v.z), activate_two<T, kRelu>(v.w));
    case kGeluTanh:
      return make_uint4(activate_two<T, kGeluTanh>(v.x), activate_two<T, kGeluTanh>(v.y), activate_two<T, kGeluTanh>(v.z), activate_two<T, kGeluTanh>(v.w));
    case kSilu:
      return make_uint4(activate_two<T, kSilu>(v.x), activate_two<T, kSilu>(v.y), activate_two<T, kSilu>(v.z), activate_two<T, kSilu>(v.w));
    default: return v;
  }
}

template <typename T>
__device__ __forceinline__ void activate_piece(uint32_t (&v)[4], int activation) {
  const uint4 out = activated<T>(make_uint4(v[0], v[1], v[2], v[3]), activation);
  v[0] = out.x, v[1] = out.y, v[2] = out.z, v[3] = out.w;
}

// The 16 bytes that begin `offset` bytes, below 16, into the 32 of `low` and `high`. Elements of Size bytes.
template <int Size>
__device__ __forceinline__ void shift_16(uint32_t (&out)[4], const uint32_t (&low)[4], const uint32_t (&high)[4], int offset) {
  uint32_t v[7];
#pragma unroll
  for (int m = 0; m < 6; ++m) {
    const uint32_t near = m < 4 ? low[m] : high[m - 4], far = m < 2 ? low[m + 2] : high[m - 2];
    v[m] = offset & 8 ? far : near;
  }
  v[6] = high[2];
#pragma unroll
  for (int m = 0; m < 5; ++m) v[m] = offset & 4 ? v[m + 1] : v[m];
#pragma unroll
  for (int m = 0; m < 4; ++m) out[m] = Size == 2 && offset & 2 ? __funnelshift_r(v[m], v[m + 1], 16) : v[m];
}

// The same of the 32 bytes at `source` in shared memory, which is aligned.
template <int Size>
__device__ __forceinline__ void load_shared_16_at(uint32_t (&out)[4], uint32_t source, int offset) {
  uint32_t low[4], high[4];
  load_shared_16(low, source);
  load_shared_16(high, source + 16);
  shift_16<Size>(out, low, high, offset);
}

// Elements from.. to - 1 of the 16 bytes whose element 0 goes to `destination`. Elements of Size bytes.
template <int Size>
__device__ __forceinline__ void store_elements(void* destination, const uint32_t (&v)[4], int from, int to) {
#pragma unroll
  for (int e = 0; e < 16 / Size; ++e) {
    if (e < from || e >= to) continue;
    if constexpr (Size == 4) static_cast<uint32_t*>(destination)[e] = v[e];
    else static_cast<uint16_t*>(destination)[e] = static_cast<uint16_t>(v[e / 2] >> (e % 2 * 16));
  }
}

// The bits of element `index` of a tensor of `Size`-byte elements.
template <int Size>
__device__ __forceinline__ uint32_t load_bits(const void* base, int64_t index) {
  if constexpr (Size == 4) return __ldg(static_cast<const uint32_t*>(base) + index);
  else return __ldg(static_cast<const uint16_t*>(base) + index);
}

template <int Size>
__device__ __forceinline__ void store_shared_element(uint32_t destination, uint32_t bits) {
  if constexpr (Size == 4) asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(destination), "r"(bits) : "memory");
  else asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(destination), "h"(static_cast<uint16_t>(bits)) : "memory");
}

template <typename T>
__device__ __forceinline__ T load_shared_element(uint32_t source) {
  T v;
  if constexpr (sizeof(T) == 4) asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(v) : "r"(source) : "memory");
  else asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(reinterpret_cast<uint16_t&>(v)) : "r"(source) : "memory");
  return v;
}

}  // namespace structlayers
