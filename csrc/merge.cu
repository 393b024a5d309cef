// The exact product of a run of chainable factors, for factors of small blocks (radix-2 butterflies above all), where
// one launch costs more than all multiplications.
//
// Contract: merge.h; float32, float16, bfloat16, float32 sums, rounded once.
//
// Index map: a CTA computes some rows j of one block (i, l), with all C columns. In shared memory it holds its rows of the
// product of the factors so far, [row][k], 512 elements or one row, and multiplies by the next factor q:
//
//   v_q[k] = sum_rho v_p[(k / c_q) r + rho] * w_q[i alpha + k / c_q, l_q, lambda + delta rho, k % c_q]
//
// where p = q - 1, alpha = a_q / A, delta = d_p / d_q, r = C_p / alpha (the link rank), and for the row R = (i B + j) D + l
// of the whole matrix l_q = R mod d_q and lambda = (R mod d_p) / d_q.
//
// Shared memory: 2 * rows * (the widest product) floats. Source: the link structure is that of arXiv:2411.04506; the kernel is new.

#include <algorithm>

#include "device.h"
#include "merge.h"
#include "tile.cuh"

namespace structlayers {
namespace {

// Few elements a CTA: a launch of one CTA a block would leave most of the GPU idle.
constexpr int kMergeThreads = 256, kMergeElements = 512, kMostMergedRow = 4096;

// The pattern of the product, and what a CTA takes of a block.
struct Merged {
  int a, b, c, d;
  int rows, tiles, floats;
};

__host__ __device__ inline Merged merged(const MergeRun& run) {
  const MergeFactor &first = run.factors[0], &last = run.factors[run.count - 1];
  Merged m{};
  m.a = first.a;
  m.d = last.d;
  m.b = static_cast<int>(static_cast<int64_t>(first.b) * first.d / m.d);
  m.c = static_cast<int>(static_cast<int64_t>(last.a) * last.c / m.a);
  int widest = 1;
  for (int q = 0; q < run.count; ++q) {
    const int64_t width = static_cast<int64_t>(run.factors[q].a) * run.factors[q].c / m.a;
    if (width > widest) widest = static_cast<int>(width);
  }
  m.rows = kMergeElements / widest < m.b ? kMergeElements / widest : m.b;
  if (m.rows == 0) m.rows = 1;
  m.tiles = (m.b + m.rows - 1) / m.rows;
  m.floats = m.rows * widest;
  return m;
}

__host__ __device__ inline unsigned ctas(const Merged& p) { return static_cast<unsigned>(p.a) * p.d * p.tiles; }

// Sizes that are all powers of two, as those of butterflies, need no division, which would be most of the instructions.
template <bool Powers>
__device__ __forceinline__ int quotient(int n, int size) {
  return Powers ? n >> (31 - __clz(size)) : n / size;
}

template <bool Powers>
__device__ __forceinline__ int remainder(int n, int size) {
  return Powers ? n & (size - 1) : n % size;
}

template <typename T, bool Powers>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ MergeRuns runs) {
  extern __shared__ float products[];
  unsigned cta = blockIdx.x;
  int which = 0;
  Merged p = merged(runs.runs[0]);
  while (cta >= ctas(p)) {
    cta -= ctas(p);
    p = merged(runs.runs[++which]);
  }
  const MergeRun& run = runs.runs[which];
  const int block = cta / p.tiles, j0 = cta % p.tiles * p.rows, rows = min(p.rows, p.b - j0);
  const int i = block / p.d, l = block % p.d;

  float *from = products, *to = products + p.floats;
  int width = 1;  // of the product so far
  for (int q = 0; q < run.count; ++q) {
    const MergeFactor& factor = run.factors[q];
    const T* w = static_cast<const T*>(factor.w);
    const int alpha = quotient<Powers>(factor.a, p.a), next = alpha * factor.c, rank = quotient<Powers>(width, alpha);
    const int left_d = q == 0 ? factor.d : run.factors[q - 1].d, delta = quotient<Powers>(left_d, factor.d);
    const bool last = q == run.count - 1;
    for (int element = threadIdx.x; element < rows * next; element += kMergeThreads) {
      const int row = quotient<Powers>(element, next), k = remainder<Powers>(element, next), s = quotient<Powers>(k, factor.c);
      const int r = (j0 + row) * p.d + l;  // within block i, whose rows begin at a multiple of every d
      const int lq = remainder<Powers>(r, factor.d);
      const T* column = w + (static_cast<int64_t>(i * alpha + s) * factor.d + lq) * factor.b * factor.c + remainder<Powers>(k, factor.c);
      float sum = 0.f;
      if (q == 0) {
        sum = to_float(column[static_cast<int64_t>(quotient<Powers>(r, factor.d)) * factor.c]);
      } else {
        const int lambda = quotient<Powers>(remainder<Powers>(r, left_d), factor.d);
        const float* v = from + row * width + s * rank;
        for (int rho = 0; rho < rank; ++rho) sum = fmaf(v[rho], to_float(column[static_cast<int64_t>(lambda + delta * rho) * factor.c]), sum);
      }
      if (last) {
        static_cast<T*>(run.out)[(static_cast<int64_t>(block) * p.b + j0 + row) * p.c + k] = from_float<T>(sum);
      } else {
        to[element] = sum;
      }
    }
    __syncthreads();
    float* const swap = from;
    from = to;
    to = swap;
    width = next;
  }
}

}  // namespace

template <typename T>
cudaError_t launch_merge(const MergeRuns& runs, cudaStream_t stream) {
  unsigned count = 0;
  int floats = 0;
  bool powers = true;
  for (int q = 0; q < runs.count; ++q) {
    const Merged p = merged(runs.runs[q]);
    if (p.floats > kMostMergedRow) return cudaErrorInvalidValue;
    count += ctas(p);
    floats = std::max(floats, p.floats);
    for (int f = 0; f < runs.runs[q].count; ++f) {
      const MergeFactor& factor = runs.runs[q].factors[f];
      for (const int size : {factor.a, factor.b, factor.c, factor.d}) powers = powers && (size & (size - 1)) == 0;
    }
  }
  const auto kernel = powers ? merge_kernel<T, true> : merge_kernel<T, false>;
  kernel<<<count, kMergeThreads, 2 * floats * sizeof(float), stream>>>(runs);
  return cudaGetLastError();
}

template cudaError_t launch_merge<float>(const MergeRuns&, cudaStream_t);
template cudaError_t launch_merge<__half>(const MergeRuns&, cudaStream_t);
template cudaError_t launch_merge<__nv_bfloat16>(const MergeRuns&, cudaStream_t);

}  // namespace structlayers
