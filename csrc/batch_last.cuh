// Batch-last product with one Kronecker-sparse factor on tensor cores (mma.sync; compute capability 8.0 and later), for
// operands made of whole 16-byte pieces; batch_last_unaligned.cuh takes the others.
//
// Contract: product.h with y[(i*b + j)*d + l, n] = ...: features are rows, the batch is contiguous.
// Index map: a tile is TJ values of j and TN columns n of one block (i, l): rows of x and y that lie d*N apart. Persistent
// CTAs; j runs fastest, then l, i, n. A warp owns a MJ x MN part.
//
//   x in shared memory, per stage [k][n]   w per stage [j][k]   y before it leaves [j][n]
//
// Shared memory: Stages * (TJ * KB + K * TN * sizeof(T)) + TJ * (TN * sizeof(T) + 16) bytes.
// Preconditions (host): batch_first.cuh's, and the three operands aligned.
// Source: the pattern is that of arXiv:2405.15013; the kernel here is new.
#pragma once

#include "tile.cuh"

namespace structlayers {

template <typename T_, bool Split_, int WarpsJ_, int WarpsN_, int MJ_, int MN_, int KB_, int Stages_>
struct BatchLastTile {
  using T = T_;
  static constexpr bool Split = Split_;
  static constexpr int WarpsJ = WarpsJ_, WarpsN = WarpsN_, MJ = MJ_, MN = MN_, KB = KB_, Stages = Stages_;
  static constexpr int Size = sizeof(T), E = 16 / Size, K = KB / Size, Chunks = KB / 16;
  static constexpr int TJ = WarpsJ * MJ, TN = WarpsN * MN, Threads = 32 * WarpsJ * WarpsN;
  static constexpr int WBytes = TJ * KB, XRow = TN * Size, StageBytes = WBytes + K * XRow, YRow = TN * Size + 16;
  static constexpr int SharedBytes = Stages * StageBytes + TJ * YRow, YParts = 1;
  static_assert(MJ % 16 == 0 && MN % 16 == 0 && XRow % 128 == 0 && Stages >= 3);
};

// What does not depend on how operands come in: where work lies, the products, and the way of y to shared memory.
template <typename Tile>
struct BatchLastFrame {
  using T = typename Tile::T;
  static constexpr int E = Tile::E, Size = Tile::Size;

  const Product& p;
  const uint32_t shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_j = warp % Tile::WarpsJ, warp_n = warp / Tile::WarpsJ;
  const unsigned tiles_j = (p.b + Tile::TJ - 1) / Tile::TJ;
  const int steps = (p.c + Tile::K - 1) / Tile::K;

  struct Place {
    int64_t n0;
    int i, l, j0;
  };

  __device__ __forceinline__ Place place(unsigned tile) const {
    Place at;
    at.j0 = static_cast<int>(tile % tiles_j) * Tile::TJ;
    tile /= tiles_j;
    at.l = static_cast<int>(tile % p.d);
    tile /= p.d;
    at.i = static_cast<int>(tile % p.a);
    at.n0 = static_cast<int64_t>(tile / p.a) * Tile::TN;
    return at;
  }

  // The piece of row k that holds columns n, so that the eight rows of a transposing ldmatrix, or the four rows that a
  // quarter warp reads as float32, fall in different banks.
  __device__ static __forceinline__ uint32_t x_offset(int k, int chunk) {
    const int mixed = Size == 2 ? chunk ^ (k & 7) : chunk ^ ((k & 3) << 1);
    return k * Tile::XRow + mixed * 16;
  }

  using Accumulators = float[Tile::MJ / 16][Tile::MN / 8][4];

  // A step of w and of x in shared memory.
  struct Operands {
    uint32_t ws, xs;
  };

  __device__ __forceinline__ void multiply(Accumulators& acc, const Operands& operands) const {
    const uint32_t ws = operands.ws, xs = operands.xs;
    // Operands are loaded one product ahead, as in batch_first.cuh.
    constexpr int Q = Tile::MN / 16, M = Tile::MJ / 16, Groups = Tile::KB / 32;
    Operand<T, Tile::Split> a[2][M], b[2];
    auto load_a = [&](int s) {
      const uint32_t base = ws + swizzled<Tile::Chunks>(warp_j * Tile::MJ + lane % 16, 2 * s + lane / 16);
#pragma unroll
      for (int m = 0; m < M; ++m) load_matrix_x4(a[s % 2][m].v, base + m * 16 * Tile::KB);
    };
    auto load_b = [&](int product) {
      const int s = product / Q, n = warp_n * Tile::MN + product % Q * 16;
      if constexpr (Size == 2) {
        load_matrix_x4_transposed(b[product % 2].v, xs + x_offset(s * 16 + lane % 16, n / E + lane / 16));
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int k = s * 8 + r % 2 * 4 + lane % 4, column = n + r / 2 * 8 + lane / 4;
          b[product % 2].v[r] = load_shared_4(xs + x_offset(k, column / 4) + column % 4 * 4);
        }
      }
    };
    load_a(0);
    load_b(0);
#pragma unroll
    for (int product = 0; product < Groups * Q; ++product) {
      const int s = product / Q, q = product % Q;
      if (product + 1 < Groups * Q) load_b(product + 1);
      if (q == Q - 1 && s + 1 < Groups) load_a(s + 1);
      if (q == 0) {
#pragma unroll
        for (int m = 0; m < M; ++m) prepare(a[s % 2][m]);
      }
      prepare(b[product % 2]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        step(acc[m][2 * q], a[s % 2][m], b[product % 2], 0);
        step(acc[m][2 * q + 1], a[s % 2][m], b[product % 2], 1);
      }
    }
  }

  // The value of j, in the tile, of a row of y as a part of it lies in shared memory: a part is a share of every warp's rows.
  __device__ static __forceinline__ int row_of_part(int row, int part) {
    constexpr int Rows = Tile::MJ / Tile::YParts;
    return row / Rows * Tile::MJ + part * Rows + row % Rows;
  }

  // A part of the accumulators to shared memory, [j][n] with rows of YRow bytes. They are cleared.
  __device__ __forceinline__ void stage_y(Accumulators& acc, const Place& at, uint32_t ys, int part) const {
    constexpr int M = Tile::MJ / 16 / Tile::YParts;
    static_assert(M * 16 * Tile::YParts == Tile::MJ);
#pragma unroll
    for (int m0 = 0; m0 < M; ++m0) {
      const int m = part * M + m0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_j * (M * 16) + m0 * 16 + h * 8 + lane / 4, j = at.j0 + row_of_part(row, part);
        const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * p.d + at.l;
        const bool inside = j < p.b && feature < p.out_features;
        const float bias = p.bias != nullptr && inside ? to_float(static_cast<const T*>(p.bias)[feature]) : 0.f;
#pragma unroll
        for (int q = 0; q < Tile::MN / 8; ++q) {
          const int column = warp_n * Tile::MN + q * 8 + lane % 4 * 2;
          float y0 = acc[m][q][2 * h] + bias, y1 = acc[m][q][2 * h + 1] + bias;
          if (p.activation != kNone) {
            y0 = activate(y0, p.activation);
            y1 = activate(y1, p.activation);
          }
          const uint32_t destination = ys + row * Tile::YRow + column * Size;
          if constexpr (Size == 4) store_shared_8(destination, __float_as_uint(y0), __float_as_uint(y1));
          else store_shared_4(destination, pack_two<T>(y0, y1));
          acc[m][q][2 * h] = 0.f;
          acc[m][q][2 * h + 1] = 0.f;
        }
      }
    }
  }

  __device__ BatchLastFrame(const Product& product, uint32_t shared_base) : p(product), shared(shared_base) {}

  // `loader` has: reader(place), which points to a tile's operands; load(reader, stage), which starts the copies of its next
  // step; ready(place, step, stage), which returns where the operands of a step that has landed lie; finish(acc, place).
  template <typename Loader>
  __device__ __forceinline__ void run_tiles(const Loader& loader, unsigned tiles) const {
    // Stages - 1 steps of (tile, k) are in flight or being multiplied; they run on from tile to tile.
    unsigned tile = blockIdx.x, load_tile = tile;
    if (tile >= tiles) return;
    Place at = place(tile);
    auto load_reader = loader.reader(at);
    int s = 0, load_s = 0, stage = 0, load_stage = 0;
    auto load_one = [&] {
      if (load_tile < tiles) {
        loader.load(load_reader, load_stage);
        load_stage = load_stage + 1 == Tile::Stages ? 0 : load_stage + 1;
        if (++load_s == steps) {
          load_s = 0;
          load_tile += gridDim.x;
          if (load_tile < tiles) load_reader = loader.reader(place(load_tile));
        }
      }
      copy_async_commit();
    };
#pragma unroll
    for (int q = 0; q < Tile::Stages - 1; ++q) load_one();
    Accumulators acc = {};
    while (true) {
      copy_async_wait<Tile::Stages - 2>();
      // Everybody's pieces of this step have landed, and everybody is done with the step before.
      __syncthreads();
      load_one();
      const Operands operands = loader.ready(at, s, stage);
      if (at.j0 + warp_j * Tile::MJ < p.b) multiply(acc, operands);
      stage = stage + 1 == Tile::Stages ? 0 : stage + 1;
      if (++s == steps) {
        loader.finish(acc, at);
        s = 0;
        tile += gridDim.x;
        if (tile >= tiles) return;
        at = place(tile);
      }
    }
  }
};

template <typename Tile>
struct BatchLast : BatchLastFrame<Tile> {
  using Frame = BatchLastFrame<Tile>;
  using Frame::Frame, Frame::E, Frame::Size, Frame::p, Frame::shared, Frame::x_offset, Frame::stage_y;
  using typename Frame::T, typename Frame::Place, typename Frame::Accumulators, typename Frame::Operands;

  // What a thread copies of every step: one chunk of k in rows j of w, WRows apart, and one chunk of n in rows k of x,
  // XRows apart. Moves on by one step at a time.
  static constexpr int WRows = Tile::Threads / Tile::Chunks, XChunks = Tile::TN / E, XRows = Tile::Threads / XChunks;
  static_assert(Tile::TJ % WRows == 0 && Tile::K % XRows == 0 && XRows % 8 == 0);

  struct Reader {
    const T *w, *x;
    int w_rows, w_left;  // rows j from the first that exist, elements of k left
    int x_rows, valid_n;  // rows k left, elements of the chunk of n that exist
  };

  __device__ __forceinline__ Reader reader(const Place& at) const {
    Reader r;
    const int w_chunk = threadIdx.x % Tile::Chunks, w_row = threadIdx.x / Tile::Chunks;
    const int64_t block = (static_cast<int64_t>(at.i) * p.d + at.l) * p.b;
    r.w = static_cast<const T*>(p.w) + (block + at.j0 + w_row) * p.c + w_chunk * E;
    r.w_rows = p.b - at.j0 - w_row;
    r.w_left = p.c - w_chunk * E;
    const int x_chunk = threadIdx.x % XChunks, x_row = threadIdx.x / XChunks;
    const int64_t n = at.n0 + x_chunk * E, k0 = static_cast<int64_t>(at.i) * p.c;
    r.x = static_cast<const T*>(p.x) + ((k0 + x_row) * p.d + at.l) * p.x_stride + n;
    r.valid_n = static_cast<int>(max(int64_t{0}, min(p.n - n, int64_t{E})));
    // Features l, d + l, 2d + l ... below the logical input size.
    const int64_t existing = p.in_features > at.l ? (p.in_features - at.l - 1) / p.d + 1 - k0 : 0;
    r.x_rows = static_cast<int>(max(int64_t{0}, min(existing, int64_t{p.c}))) - x_row;
    return r;
  }

  __device__ __forceinline__ void load(Reader& r, int stage) const {
    const uint32_t ws = shared + stage * Tile::StageBytes + swizzled<Tile::Chunks>(threadIdx.x / Tile::Chunks, threadIdx.x % Tile::Chunks);
#pragma unroll
    for (int u = 0; u < Tile::TJ / WRows; ++u) {
      const T* source = r.w + static_cast<int64_t>(u * WRows) * p.c;
      copy_piece(ws + u * WRows * Tile::KB, source, u * WRows < r.w_rows ? r.w_left : 0);
    }
    const uint32_t xs = shared + stage * Tile::StageBytes + Tile::WBytes + x_offset(threadIdx.x / XChunks, threadIdx.x % XChunks);
    const int64_t stride = p.d * p.x_stride;
#pragma unroll
    for (int u = 0; u < Tile::K / XRows; ++u) {
      copy_piece(xs + u * XRows * Tile::XRow, r.x + u * XRows * stride, u * XRows < r.x_rows ? r.valid_n : 0);
    }
    r.w += Tile::K;
    r.w_left -= Tile::K;
    r.x += Tile::K * stride;
    r.x_rows -= Tile::K;
  }

  // Sixteen bytes of a row of which `valid` elements exist.
  __device__ __forceinline__ void copy_piece(uint32_t destination, const T* source, int valid) const {
    copy_async_16(destination, valid > 0 ? source : p.w, max(0, min(valid, E)) * Size);
  }

  __device__ __forceinline__ void finish(Accumulators& acc, const Place& at) const {
    const uint32_t ys = shared + Tile::Stages * Tile::StageBytes;
    stage_y(acc, at, ys, 0);
    __syncthreads();
    for (int unit = threadIdx.x; unit < Tile::TJ * (Tile::TN / E); unit += Tile::Threads) {
      const int chunk = unit % (Tile::TN / E), row = unit / (Tile::TN / E);
      const int64_t feature = (static_cast<int64_t>(at.i) * p.b + at.j0 + row) * p.d + at.l, n = at.n0 + chunk * E;
      if (at.j0 + row >= p.b || feature >= p.out_features || n >= p.n) continue;
      uint32_t v[4];
      load_shared_16(v, ys + row * Tile::YRow + chunk * 16);
      T* destination = static_cast<T*>(p.y) + feature * p.y_stride + n;
      if (n + E <= p.n) store_global_16(destination, v);
      else store_elements<Size>(destination, v, 0, static_cast<int>(p.n - n));
    }
  }

  __device__ __forceinline__ Operands ready(const Place&, int, int stage) const {
    const uint32_t ws = shared + stage * Tile::StageBytes;
    return {ws, ws + Tile::WBytes};
  }

  __device__ void run(unsigned tiles) const { this->run_tiles(*this, tiles); }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1) batch_last_kernel(const __grid_constant__ Product p, unsigned tiles) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchLast<Tile>(p, shared_address(dynamic_shared)).run(tiles);
}

}  // namespace structlayers
