// Product of a small batch with one Kronecker-sparse factor on tensor cores (mma.sync; compute capability 8.0 and later).
// Such a product is as fast as its weights arrive, and as short as a launch.
//
// Contract: product.h, both layouts, any a, b, c, d >= 1 and any N >= 1 (made for N <= 64); float32 (as TF32, or split into
// two TF32 numbers), float16, bfloat16; float32 accumulation.
//
// Index map: a CTA owns one i, `run` neighbouring l, TJ = 16 * warps_j values of j and TN = 8 * NT rows n; j runs fastest
// over the grid, then l, n and i. A warp owns one l and 16 values of j, and every warps_k-th chunk (64 bytes) of k; the
// warps_k partial sums meet in shared memory.
//
// The weights are the 16-row operand. They never pass through shared memory: with the same order of k on both sides, any
// order will do, so that the 16 bytes that a lane loads are its part of two products:
//
//   w[i, l, j, :], a chunk   [ 16 bytes | 16 bytes | 16 bytes | 16 bytes ]      lane 4g + t loads piece t of rows g and g + 8
//                              lanes t=0  t=1        t=2        t=3             words 0, 1: first product; 2, 3: second
//   x[n, ...], likewise        row n = 8q + g is column g of product q
//
//   x: Direct (d = 1, few rows), from global memory as above; else all threads turn it on the way into shared memory,
//   per step [l][n][k].   y leaves through shared memory: [part of k][l][n][j], float32, summed over the parts, l fastest.
//
// Programmatic dependent launch (9.0): the kernel may start while its predecessor runs; until griddepcontrol.wait it reads and
// writes nothing, so that only the launch overlaps. Loads of weights before the wait would be wrong wherever the kernel before
// has just written them and lets its successors start early, as kernels of other libraries may; asking the L2 for them there
// (cp.async.bulk.prefetch) gained up to 0.5 us a chain, but nothing orders such a request before the end of the kernel, and
// therefore before the memory is given back. Every thread waits, so that the end of this kernel implies the end of those
// before it; therefore launch_dependents may come first. Nothing is read through the non-coherent path, since x may be written
// while this kernel runs.
//
// Shared memory: max(run * TN * x_pitch, 4 * warps_k * run * l_pitch) bytes; k is cut into steps where x would take more
// than 96 KB.
// Preconditions (host): a*c*d and a*b*d < 2^31; w contiguous; 16-byte alignment only where the flags say so.
// Source: new.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace structlayers {

// How the host cuts a product.
struct SmallBatchCut {
  int run_log, warps_j_log, warps_k;
  int k_step;    // values of k in shared memory at a time
  int x_pitch;   // bytes from row to row of x there
  int l_pitch;   // numbers from l to l of the partial sums
  int group;     // l that a thread turns at once; 0: x travels element by element
  unsigned tiles_n, tiles_j, tiles_l;
  int64_t x_n, x_feature, y_n, y_feature;  // elements between neighbours
  bool batch_last;
};

__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Read once: kept out of the L1. Coherent, unlike load_global_16.
__device__ __forceinline__ void load_stream_16(uint32_t (&v)[4], const void* source) {
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(source)
               : "memory");
}

template <typename T, bool Split, int NT, bool Direct>
class SmallBatch {
  static constexpr int Size = sizeof(T), E = 16 / Size, Chunk = 4 * E, TN = 8 * NT;
  // Chunks of the weights that a warp has on their way at once.
  static constexpr int Ahead = 4;
  using Bits = std::conditional_t<Size == 4, uint32_t, uint16_t>;

  const Product& p;
  const SmallBatchCut& cut;
  const uint32_t shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int run = 1 << cut.run_log, tj_log = 4 + cut.warps_j_log;
  const int warp_l = warp & (run - 1), warp_j = warp >> cut.run_log & ((1 << cut.warps_j_log) - 1);
  const int warp_k = warp >> (cut.run_log + cut.warps_j_log);
  int i, j0, l0, rows;
  int64_t n0;

 public:
  __device__ __forceinline__ SmallBatch(const Product& product, const SmallBatchCut& cuts, const void* memory)
      : p(product), cut(cuts), shared(shared_address(memory)) {
    unsigned tile = blockIdx.x;
    j0 = static_cast<int>(tile % cut.tiles_j) << tj_log;
    tile /= cut.tiles_j;
    l0 = static_cast<int>(tile % cut.tiles_l) << cut.run_log;
    tile /= cut.tiles_l;
    n0 = static_cast<int64_t>(tile % cut.tiles_n) * TN;
    i = static_cast<int>(tile / cut.tiles_n);
    rows = static_cast<int>(min(p.n - n0, int64_t{TN}));
  }

  __device__ __forceinline__ void multiply() {
    let_dependents_start();
    wait_for_predecessors();
    float acc[NT][4] = {};
    const int j = j0 + 16 * warp_j + g, l = l0 + warp_l;
    const T* weights = static_cast<const T*>(p.w) + ((static_cast<int64_t>(i) * p.d + l) * p.b + j) * p.c + t * E;
    const int valid_rows = l < p.d ? p.b - j : 0;
    const int apart = cut.warps_k * Chunk;
    for (int k0 = 0; k0 < p.c; k0 += cut.k_step) {
      const int end = min(p.c, k0 + cut.k_step);
      int k = k0 + warp_k * Chunk;
      uint32_t w[Ahead][2][4];
      if (p.w_aligned) load_weights(w, weights, valid_rows, k, end);
      if constexpr (!Direct) {
        if (k0 > 0) __syncthreads();
        fill(k0, end);
        __syncthreads();
        if (!p.w_aligned) {
          multiply_unaligned(acc, weights, valid_rows, k0, end);
          continue;
        }
      }
      while (k < end) {
        // All of them before the first product: each of them comes from the L2.
        uint32_t x[Direct ? Ahead : 1][NT][4];
        if constexpr (Direct) {
#pragma unroll
          for (int u = 0; u < Ahead; ++u) {
#pragma unroll
            for (int q = 0; q < NT; ++q) load_input(x[u][q], 8 * q + g, k + u * apart + t * E);
          }
        }
#pragma unroll
        for (int u = 0; u < Ahead; ++u) {
          if (k + u * apart < end) multiply_chunk(acc, w[u], x[Direct ? u : 0], k + u * apart - k0);
        }
        k += Ahead * apart;
        load_weights(w, weights, valid_rows, k, end);
      }
    }
    write(acc);
  }

 private:
  // The pieces of rows g and g + 8 in the chunks from k on; what does not exist counts as zeros.
  __device__ __forceinline__ void load_weights(uint32_t (&w)[Ahead][2][4], const T* weights, int valid_rows, int k, int end) const {
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      const int first = k + u * cut.warps_k * Chunk;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int m = 0; m < 4; ++m) w[u][r][m] = 0;
        if (first >= end || first + t * E >= p.c || 8 * r >= valid_rows) continue;
        load_stream_16(w[u][r], weights + static_cast<int64_t>(8 * r) * p.c + first);
      }
    }
  }

  // Rows of w that are not whole 16-byte pieces: chunk by chunk.
  __device__ __forceinline__ void multiply_unaligned(float (&acc)[NT][4], const T* weights, int valid_rows, int k0, int end) const {
#pragma unroll 1
    for (int k = k0 + warp_k * Chunk; k < end; k += cut.warps_k * Chunk) {
      uint32_t w[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int valid = 8 * r < valid_rows ? p.c - k - t * E : 0;
        const uint4 v = load_weight_elements(weights + static_cast<int64_t>(8 * r) * p.c + k, valid);
        w[r][0] = v.x, w[r][1] = v.y, w[r][2] = v.z, w[r][3] = v.w;
      }
      const uint32_t none[NT][4] = {};
      multiply_chunk(acc, w, none, k - k0);
    }
  }

  // By value: an array behind a reference would live in local memory.
  __device__ static __noinline__ uint4 load_weight_elements(const T* source, int valid) {
    const Bits* bits = reinterpret_cast<const Bits*>(source);
    uint32_t v[4] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (e < valid) v[e * Size / 4] |= static_cast<uint32_t>(bits[e]) << (e * Size % 4 * 8);
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }

  // `k` counts from the beginning of the step.
  __device__ __forceinline__ void multiply_chunk(float (&acc)[NT][4], const uint32_t (&w)[2][4], const uint32_t (&x)[NT][4],
                                                 int k) const {
    Operand<T, Split> a[2], b[NT];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < 4; ++m) a[half].v[m] = w[m % 2][2 * half + m / 2];
      prepare(a[half]);
    }
#pragma unroll
    for (int q = 0; q < NT; ++q) {
      if constexpr (Direct) {
#pragma unroll
        for (int m = 0; m < 4; ++m) b[q].v[m] = x[q][m];
      } else {
        load_shared_16(b[q].v, shared + (warp_l * TN + 8 * q + g) * cut.x_pitch + k * Size + t * 16);
      }
    }
#pragma unroll
    for (int q = 0; q < NT; ++q) {
      prepare(b[q]);
      step<T, Split>(acc[q], a[0], b[q], 0);
      step<T, Split>(acc[q], a[1], b[q], 1);
    }
  }

  __device__ __forceinline__ void load_input(uint32_t (&v)[4], int row, int k) const {
    const int64_t column = static_cast<int64_t>(i) * p.c + k;
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (row < rows && k < p.c && column < p.in_features) {
      piece = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + (n0 + row) * p.x_stride + column);
    }
    v[0] = piece.x, v[1] = piece.y, v[2] = piece.z, v[3] = piece.w;
  }

  // x of k0 to end - 1 to shared memory, whole chunks. Rows that do not exist stay what they are: they are other columns.
  __device__ __forceinline__ void fill(int k0, int end) const {
    if (cut.group == 1) fill_in_groups<1>(k0, end);
    else if (cut.group == 2) fill_in_groups<2>(k0, end);
    else if (cut.group == 4) fill_in_groups<4>(k0, end);
    else if (Size == 2 && cut.group == 8) fill_in_groups<E>(k0, end);
    else fill_by_elements(k0, end);
  }

  __device__ __forceinline__ uint32_t place(int l, int row, int piece) const {
    return shared + (l * TN + row) * cut.x_pitch + piece * 16;
  }

  // A unit is E values of k times G values of l of one row: G pieces of 16 bytes, turned in registers.
  template <int G>
  __device__ __forceinline__ void fill_in_groups(int k0, int end) const {
    using Unit = TransposeUnit<Size, G>;
    constexpr int Batch = G < 4 ? 4 / G : 1;  // units of a thread on their way at once
    const int pieces = (end - k0 + Chunk - 1) / Chunk * 4, parts_log = cut.run_log - (G == 8 ? 3 : G == 4 ? 2 : G == 2 ? 1 : 0);
    const int units = rows * pieces << parts_log;
    const int last = p.c - E;
    bool edges = false;
    for (int first = threadIdx.x; first < units; first += Batch * blockDim.x) {
      uint32_t flat[Batch][G * 4], destination[Batch];
#pragma unroll
      for (int u = 0; u < Batch; ++u) {
        const int unit = first + u * blockDim.x;
        const int part = unit & ((1 << parts_log) - 1), piece = (unit >> parts_log) % pieces, row = (unit >> parts_log) / pieces;
        const int k = k0 + piece * E, l = l0 + part * G;
        const int64_t column = (static_cast<int64_t>(i) * p.c + k) * p.d + l;
        const bool whole = k <= last && l + G <= p.d && column + static_cast<int64_t>(E - 1) * p.d + G <= p.in_features;
        const T* source = static_cast<const T*>(p.x) + (n0 + row) * cut.x_n + column;
        destination[u] = unit < units && whole ? place(part * G, row, piece) : ~0u;
        edges |= unit < units && !whole;
#pragma unroll
        for (int m = 0; m < G; ++m) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (unit < units && whole) v = *reinterpret_cast<const uint4*>(source + m * static_cast<int64_t>(G == E ? p.d : E));
          flat[u][4 * m] = v.x, flat[u][4 * m + 1] = v.y, flat[u][4 * m + 2] = v.z, flat[u][4 * m + 3] = v.w;
        }
      }
#pragma unroll
      for (int u = 0; u < Batch; ++u) {
        if (destination[u] == ~0u) continue;
        uint32_t separate[G][4];
        Unit::separate(flat[u], separate);
#pragma unroll
        for (int l = 0; l < G; ++l) store_shared_16(destination[u] + l * TN * cut.x_pitch, separate[l]);
      }
    }
    if (!edges) return;
    // What lies at an edge of the factor or of the logical input.
#pragma unroll 1
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      const int part = unit & ((1 << parts_log) - 1), piece = (unit >> parts_log) % pieces, row = (unit >> parts_log) / pieces;
      const int k = k0 + piece * E, l = l0 + part * G;
      const int64_t column = (static_cast<int64_t>(i) * p.c + k) * p.d + l;
      if (k <= last && l + G <= p.d && column + static_cast<int64_t>(E - 1) * p.d + G <= p.in_features) continue;
#pragma unroll 1
      for (int q = 0; q < G; ++q) {
        uint32_t v[4];
        load_elements((n0 + row) * cut.x_n, k, l + q, v);
        store_shared_16(place(part * G + q, row, piece), v);
      }
    }
  }

  __device__ __forceinline__ void fill_by_elements(int k0, int end) const {
    const int pieces = (end - k0 + Chunk - 1) / Chunk * 4;
    const int units = rows * pieces << cut.run_log;
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      // Neighbouring threads take what is contiguous: l, or n.
      const int row = cut.batch_last ? unit % rows : (unit >> cut.run_log) / pieces;
      const int rest = cut.batch_last ? unit / rows : unit;
      const int l = rest & (run - 1), piece = cut.batch_last ? rest >> cut.run_log : (rest >> cut.run_log) % pieces;
      uint32_t v[4];
      load_elements((n0 + row) * cut.x_n, k0 + piece * E, l0 + l, v);
      store_shared_16(place(l, row, piece), v);
    }
  }

  // E values of k of one l, `row` elements from the beginning of x; zeros where there are none.
  __device__ __forceinline__ void load_elements(int64_t row, int k, int l, uint32_t (&v)[4]) const {
    const int64_t first = (static_cast<int64_t>(i) * p.c + k) * p.d + l;
    const Bits* source = static_cast<const Bits*>(p.x) + row + first * cut.x_feature;
    const int64_t apart = p.d * cut.x_feature;
    Bits bits[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const bool inside = l < p.d && k + e < p.c && first + static_cast<int64_t>(e) * p.d < p.in_features;
      bits[e] = inside ? source[e * apart] : Bits{0};
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if constexpr (Size == 4) v[m] = bits[m];
      else v[m] = static_cast<uint32_t>(bits[2 * m]) | static_cast<uint32_t>(bits[2 * m + 1]) << 16;
    }
  }

  // [part of k][l][n][j]; a row of j is 4 numbers longer than TJ, so that what a warp stores falls in 32 banks.
  __device__ __forceinline__ void write(const float (&acc)[NT][4]) const {
    const int j_pitch = (1 << tj_log) + 4;
    if constexpr (!Direct) __syncthreads();
    const uint32_t own = shared + 4 * ((warp_k * run + warp_l) * cut.l_pitch + 16 * warp_j + g);
#pragma unroll
    for (int q = 0; q < NT; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        store_shared_4(own + 4 * ((8 * q + 2 * t + r % 2) * j_pitch + 8 * (r / 2)), __float_as_uint(acc[q][r]));
      }
    }
    __syncthreads();
    const int outputs = rows << (cut.run_log + tj_log);
    // Several at a time, so that a thread waits for shared memory less often.
    constexpr int Batch = 4;
    for (int first = threadIdx.x; first < outputs; first += Batch * blockDim.x) {
      float sum[Batch];
      uint32_t source[Batch];
      int64_t row[Batch], feature[Batch];
      bool inside[Batch];
#pragma unroll
      for (int u = 0; u < Batch; ++u) {
        const int index = first + u * blockDim.x;
        const int r = cut.batch_last ? index % rows : index >> (cut.run_log + tj_log);
        const int rest = cut.batch_last ? index / rows : index;
        const int dl = rest & (run - 1), dj = rest >> cut.run_log & ((1 << tj_log) - 1);
        const int l = l0 + dl, j = j0 + dj;
        row[u] = n0 + r;
        feature[u] = (static_cast<int64_t>(i) * p.b + j) * p.d + l;
        inside[u] = index < outputs && l < p.d && j < p.b && feature[u] < p.out_features;
        source[u] = inside[u] ? shared + 4 * (dl * cut.l_pitch + r * j_pitch + dj) : shared;
        sum[u] = inside[u] && p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[feature[u]]) : 0.f;
      }
#pragma unroll 1
      for (int part = 0; part < cut.warps_k; ++part) {
#pragma unroll
        for (int u = 0; u < Batch; ++u) sum[u] += __uint_as_float(load_shared_4(source[u] + 4 * part * run * cut.l_pitch));
      }
#pragma unroll
      for (int u = 0; u < Batch; ++u) {
        if (!inside[u]) continue;
        if (p.activation != kNone) sum[u] = activate(sum[u], p.activation);
        static_cast<T*>(p.y)[row[u] * cut.y_n + feature[u] * cut.y_feature] = from_float<T>(sum[u]);
      }
    }
  }
};

template <typename T, bool Split, int NT, bool Direct>
__global__ void __launch_bounds__(512) small_batch_kernel(const __grid_constant__ Product p, const __grid_constant__ SmallBatchCut cut) {
  extern __shared__ __align__(128) char memory[];
  SmallBatch<T, Split, NT, Direct>(p, cut, memory).multiply();
}

}  // namespace structlayers
