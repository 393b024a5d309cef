// Batch-first product with one Kronecker-sparse factor on tensor cores (mma.sync; compute capability 8.0 and later).
//
// Contract: product.h. Any a, b, c, d >= 1 and any N >= 1; float32 (as TF32, or split into two TF32 numbers), float16,
// bfloat16; float32 accumulation.
//
// Index map: a tile is TN rows n, TJ values of j and DL neighbouring l of one i. The grid is persistent: CTA s takes tiles
// s, s + gridDim.x, ...; j runs fastest, then l, i and n, so that CTAs that read the same rows of x run together. A warp
// owns LW values of l and a MN x MJ part of their (n, j) tiles.
//
//   x in global memory, one row n        k0        k0+1      k0+2 ...      (each cell one l; a run of DL is contiguous)
//                                   [l0 l1 .. l][l0 l1 .. l][l0 l1 .. l]
//   a thread takes E values of k times G values of l, permutes them in registers and stores E values of k for each l:
//   x in shared memory, per stage   [l][n][k]   w per stage [l][j][k]   y before it leaves [l][n][j]
//
// Shared memory: DL * (2 * TN + WStages * TJ) * KB + DL * TN * (TJ / YParts * sizeof(T) + 16) bytes.
// Preconditions (host): a*c*d and a*b*d < 2^31; w contiguous; 16-byte alignment only where the flags say so.
// Source: the pattern and its blocks are those of arXiv:2405.15013; the kernel here is new: tensor cores, the l-run
// de-interleaved on the way into shared memory, any shape.
#pragma once

#include "tile.cuh"

namespace structlayers {

template <typename T_, bool Split_, int DL_, int LW_, int WarpsN_, int WarpsJ_, int MN_, int MJ_, int KB_, int WStages_,
          int YParts_>
struct BatchFirstTile {
  using T = T_;
  static constexpr bool Split = Split_;
  static constexpr int DL = DL_, LW = LW_, WarpsN = WarpsN_, WarpsJ = WarpsJ_, MN = MN_, MJ = MJ_;
  static constexpr int KB = KB_, WStages = WStages_, YParts = YParts_;
  static constexpr int Size = sizeof(T), E = 16 / Size;
  static constexpr int WarpsL = DL / LW, TN = WarpsN * MN, TJ = WarpsJ * MJ, Threads = 32 * WarpsL * WarpsN * WarpsJ;
  static constexpr int WThreads = Threads, WSteps = 1;
  static constexpr int K = KB / Size, Chunks = KB / 16;
  static constexpr int G = DL < E ? DL : E, Parts = DL / G;  // l per transpose unit; units along l
  static constexpr int XBytes = DL * TN * KB, WBytes = DL * TJ * KB;
  static constexpr int YColumns = MJ / YParts;  // values of j of a warp that leave together
  static constexpr int YRow = WarpsJ * YColumns * Size + 16;
  static constexpr int YRows = TN;  // rows that leave together
  static constexpr bool BouncesY = false;
  __device__ static int y_row(int, int row) { return row; }
  __device__ static int y_column(int part, int column) {
    return column / YColumns * MJ + part * YColumns + column % YColumns;
  }
  static constexpr int WOffset = 2 * XBytes, YOffset = WOffset + WStages * WBytes;
  static constexpr int SharedBytes = YOffset + DL * TN * YRow;
  static constexpr int XUnits = TN * Chunks * Parts, XPerThread = (XUnits + Threads - 1) / Threads;
  static constexpr int WUnits = DL * TJ * Chunks, YPieces = TJ / YParts / E;  // 16-byte pieces of a row of y in shared memory
  static_assert(DL % LW == 0 && MN % 16 == 0 && MJ % 16 == 0 && DL % G == 0 && KB % 32 == 0);
  static_assert((WStages == 2 || WStages == 3) && MJ % YParts == 0 && YColumns % E == 0 && YColumns % 8 == 0);
};

// What every version of the kernel shares: the walk over tiles, x and w on their way into shared memory, y on its way out.
template <typename Tile>
class BatchFirstTraffic {
 protected:
  using T = typename Tile::T;
  using Unit = TransposeUnit<Tile::Size, Tile::G>;
  static constexpr int E = Tile::E, G = Tile::G, Size = Tile::Size, Chunks = Tile::Chunks, Threads = Tile::Threads;

  struct Place {
    int64_t n0;
    int i, l0, j0;
  };

  const Product& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  const unsigned tiles_j = (p.b + Tile::TJ - 1) / Tile::TJ, tiles_l = (p.d + Tile::DL - 1) / Tile::DL;
  const int steps = (p.c + Tile::K - 1) / Tile::K;
  // Runs of l are whole 16-byte pieces, or all l of the pattern lie together; otherwise elements travel one by one.
  const bool whole_runs = G == E ? p.d % E == 0 : p.d == G;

  __device__ __forceinline__ Place place(unsigned tile) const {
    Place at;
    at.j0 = static_cast<int>(tile % tiles_j) * Tile::TJ;
    tile /= tiles_j;
    at.l0 = static_cast<int>(tile % tiles_l) * Tile::DL;
    tile /= tiles_l;
    at.i = static_cast<int>(tile % p.a);
    at.n0 = static_cast<int64_t>(tile / p.a) * Tile::TN;
    return at;
  }

  // Elements between the 16-byte pieces of a transpose unit in global memory.
  __device__ __forceinline__ int64_t piece() const { return G == E ? p.d : E; }

  // ---- x: global memory, registers (interleaved), shared memory (separate)

  // What a thread reads of every step: rows XRowStep apart, one chunk of k, one part of the run of l.
  struct XReader {
    const T* source;  // of the step to load
    int k, k_whole;   // first k of the step to load; units that end before k_whole may be read as a whole
    int rows;         // rows from its first that exist
  };
  static constexpr int XRowStep = Threads / (Tile::Parts * Chunks);
  const int x_part = threadIdx.x % Tile::Parts, x_chunk = threadIdx.x / Tile::Parts % Chunks;
  const int x_row = threadIdx.x / (Tile::Parts * Chunks);

  __device__ __forceinline__ XReader x_reader(const Place& at) const {
    XReader reader;
    const int l = at.l0 + x_part * G;
    const int64_t n = at.n0 + x_row;
    reader.k = x_chunk * E;
    reader.source = static_cast<const T*>(p.x) + n * p.x_stride + (static_cast<int64_t>(at.i) * p.c + reader.k) * p.d + l;
    reader.rows = l < p.d ? static_cast<int>(min(p.n - n, int64_t{Tile::TN})) : 0;
    reader.k_whole = p.x_aligned && whole_runs ? p.c : 0;
    if (p.in_features < (static_cast<int64_t>(at.i) + 1) * p.c * p.d) {
      const int64_t last = p.in_features - l - G;
      reader.k_whole = min(int64_t{reader.k_whole}, last < 0 ? 0 : last / p.d + 1 - static_cast<int64_t>(at.i) * p.c);
    }
    return reader;
  }

  __device__ static __forceinline__ bool x_unit_exists(int u) {
    return Tile::XUnits % Threads == 0 || threadIdx.x + u * Threads < Tile::XUnits;
  }

  __device__ __forceinline__ void load_x(uint32_t (&x)[Tile::XPerThread][G * 4], XReader& reader) const {
#pragma unroll
    for (int u = 0; u < Tile::XPerThread; ++u) {
      if (x_unit_exists(u) && u * XRowStep < reader.rows && reader.k + E <= reader.k_whole) {
        const T* source = reader.source + u * XRowStep * p.x_stride;
#pragma unroll
        for (int m = 0; m < G; ++m) {
          uint32_t v[4];
          load_global_16(v, source + m * piece());
#pragma unroll
          for (int r = 0; r < 4; ++r) x[u][4 * m + r] = v[r];
        }
      } else {
#pragma unroll
        for (int m = 0; m < G * 4; ++m) x[u][m] = 0;
      }
    }
    reader.source += static_cast<int64_t>(Tile::K) * p.d;
    reader.k += Tile::K;
  }

  __device__ __forceinline__ void store_x(const uint32_t (&x)[Tile::XPerThread][G * 4], const XReader& reader,
                                          const Place& at, int stage) const {
    const int k = reader.k - Tile::K;  // the reader is one step further
    const uint32_t tile = shared + stage * Tile::XBytes + swizzled<Chunks>(x_row, x_chunk) + x_part * G * (Tile::TN * Tile::KB);
#pragma unroll
    for (int u = 0; u < Tile::XPerThread; ++u) {
      if (!x_unit_exists(u)) return;
      const uint32_t destination = tile + u * XRowStep * Tile::KB;
      if (u * XRowStep < reader.rows && k < p.c && k + E > reader.k_whole) {
        copy_x_elements(p, destination, at.n0 + x_row + u * XRowStep, at.i, k, at.l0 + x_part * G);
        continue;
      }
      uint32_t separate[G][4];
      Unit::separate(x[u], separate);
#pragma unroll
      for (int l = 0; l < G; ++l) store_shared_16(destination + l * (Tile::TN * Tile::KB), separate[l]);
    }
  }

  // A unit at an edge of the factor or of the logical input, or where nothing is aligned: element by element.
  __device__ static __noinline__ void copy_x_elements(const Product& p, uint32_t destination, int64_t n, int i, int k0, int l0) {
    const T* source = static_cast<const T*>(p.x) + n * p.x_stride;
#pragma unroll 1
    for (int l = 0; l < G; ++l) {
#pragma unroll 1
      for (int k = 0; k < E; ++k) {
        const int64_t column = (static_cast<int64_t>(i) * p.c + k0 + k) * p.d + l0 + l;
        const bool inside = k0 + k < p.c && l0 + l < p.d && column < p.in_features;
        store_shared_element<Size>(destination + l * (Tile::TN * Tile::KB) + k * Size, inside ? load_bits<Size>(source, column) : 0);
      }
    }
  }

  // ---- w: global memory to shared memory

  // What a thread copies of every stage of w (WSteps steps): rows j and runs l WRows apart, one chunk of k. Moves on by one
  // stage at a time.
  static constexpr int WChunks = Chunks * Tile::WSteps, WRowBytes = Tile::KB * Tile::WSteps, WK = Tile::K * Tile::WSteps;
  static constexpr int WRows = Tile::WThreads / WChunks, WPerThread = Tile::WUnits / Tile::WThreads;
  static_assert(Tile::WUnits % Tile::WThreads == 0 && (WRows % Tile::TJ == 0 || Tile::TJ % WRows == 0));
  const int w_row = threadIdx.x / WChunks % Tile::TJ, w_l = threadIdx.x / (WChunks * Tile::TJ);

  struct WReader {
    const T* source;
    int rows, runs, left;  // rows j and runs l from its first that exist, elements of k left
  };

  __device__ __forceinline__ WReader w_reader(const Place& at) const {
    const int chunk = threadIdx.x % WChunks, l = at.l0 + w_l, j = at.j0 + w_row;
    const int64_t row = (static_cast<int64_t>(at.i) * p.d + l) * p.b + j;
    return {static_cast<const T*>(p.w) + row * p.c + chunk * E, p.b - j, p.d - l, p.c - chunk * E};
  }

  template <bool Aligned>
  __device__ __forceinline__ void load_w(WReader& reader, int stage) const {
    const uint32_t base = shared + Tile::WOffset + stage * Tile::WBytes + w_l * (Tile::TJ * WRowBytes) +
                          swizzled<WChunks>(w_row, threadIdx.x % WChunks);
    const int64_t block = static_cast<int64_t>(p.b) * p.c;
#pragma unroll
    for (int u = 0; u < WPerThread; ++u) {
      // Rows of the same l first, or the same row of further l.
      const int dl = WRows >= Tile::TJ ? u * (WRows / Tile::TJ) : u / (Tile::TJ / WRows);
      const int dj = WRows >= Tile::TJ ? 0 : u % (Tile::TJ / WRows) * WRows;
      const bool inside = dj < reader.rows && dl < reader.runs && reader.left > 0;
      const uint32_t destination = base + (dl * Tile::TJ + dj) * WRowBytes;
      const T* source = reader.source + dl * block + static_cast<int64_t>(dj) * p.c;
      if constexpr (Aligned) copy_async_16(destination, inside ? source : p.w, inside ? 16 : 0);
      else copy_w_elements(destination, source, inside ? reader.left : 0);
    }
    reader.source += WK;
    reader.left -= WK;
  }

  __device__ static __noinline__ void copy_w_elements(uint32_t destination, const T* source, int valid) {
#pragma unroll 1
    for (int k = 0; k < E; ++k) store_shared_element<Size>(destination + k * Size, k < valid ? load_bits<Size>(source, k) : 0);
  }

  // ---- y: shared memory (separate), global memory (interleaved)

  __device__ __forceinline__ void write_y(const Place& at, int y_part) const {
    constexpr int Pieces = Tile::YPieces;
    if constexpr (Tile::BouncesY) {
      if (p.y_aligned && whole_runs && p.d % Tile::DL == 0 && p.n - at.n0 >= Tile::TN && p.b - at.j0 >= Tile::TJ &&
          (static_cast<int64_t>(at.i) + 1) * p.b * p.d <= p.out_features) {
        write_y_whole(at, y_part);
        return;
      }
    }
    constexpr int Parts = Tile::Parts;
#pragma unroll 1
    for (int unit = threadIdx.x; unit < Tile::YRows * Pieces * Parts; unit += Threads) {
      const int part = unit % Parts, chunk = unit / Parts % Pieces, row = unit / (Parts * Pieces);
      const int64_t n = at.n0 + Tile::y_row(y_part, row);
      const int j = at.j0 + Tile::y_column(y_part, chunk * E), l = at.l0 + part * G;
      if (n >= p.n || j >= p.b || l >= p.d) continue;
      const uint32_t ys = shared + Tile::YOffset + (part * G * Tile::YRows + row) * Tile::YRow + chunk * 16;
      const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * p.d + l;
      T* destination = static_cast<T*>(p.y) + n * p.y_stride + feature;
      if (!p.y_aligned || !whole_runs || j + E > p.b || feature + (E - 1) * static_cast<int64_t>(p.d) + G > p.out_features) {
        write_y_elements(p, ys, destination, p.b - j, p.d - l, p.out_features - feature);
        continue;
      }
      uint32_t separate[G][4], flat[G * 4];
#pragma unroll
      for (int g = 0; g < G; ++g) load_shared_16(separate[g], ys + g * (Tile::YRows * Tile::YRow));
      Unit::interleave(separate, flat);
#pragma unroll
      for (int m = 0; m < G; ++m) {
        const uint32_t v[4] = {flat[4 * m], flat[4 * m + 1], flat[4 * m + 2], flat[4 * m + 3]};
        store_global_16(destination + m * piece(), v);
      }
    }
  }

  // As write_y where nothing is cut off. A warp takes whole rows: it turns its units, puts the pieces back in the place they
  // came from, and then writes them in the order of global memory, neighbouring threads neighbouring pieces: the L2 counts
  // requests, and one request holds up to 128 bytes.
  __device__ __forceinline__ void write_y_whole(const Place& at, int y_part) const {
    constexpr int Parts = Tile::Parts, Pieces = Tile::YPieces, RowUnits = Parts * Pieces, WarpRows = 32 / RowUnits;
    static_assert(Pieces == 8 && 32 % RowUnits == 0 && Tile::YRows % WarpRows == 0);
    const int part = lane % Parts, chunk = lane / Parts % Pieces, warp_row = lane / RowUnits;
    // Piece m of a unit lies at run m of its part; where along the row is mixed, so that neighbours fall in different banks.
    auto place_of = [&](int row, int piece_part, int piece_chunk, int m) {
      const int mixed = piece_chunk ^ (m % 8) ^ (piece_part * 4);
      return shared + Tile::YOffset + ((piece_part * G + m) * Tile::YRows + row) * Tile::YRow + mixed * 16;
    };
    const int64_t feature = (static_cast<int64_t>(at.i) * p.b + at.j0 + Tile::y_column(y_part, 0)) * p.d + at.l0;
#pragma unroll 1
    for (int row0 = threadIdx.x / 32 * WarpRows; row0 < Tile::YRows; row0 += Threads / 32 * WarpRows) {
      const uint32_t ys = shared + Tile::YOffset + (part * G * Tile::YRows + row0 + warp_row) * Tile::YRow + chunk * 16;
      uint32_t separate[G][4], flat[G * 4];
#pragma unroll
      for (int g = 0; g < G; ++g) load_shared_16(separate[g], ys + g * (Tile::YRows * Tile::YRow));
      Unit::interleave(separate, flat);
      __syncwarp();
#pragma unroll
      for (int m = 0; m < G; ++m) {
        const uint32_t v[4] = {flat[4 * m], flat[4 * m + 1], flat[4 * m + 2], flat[4 * m + 3]};
        store_shared_16(place_of(row0 + warp_row, part, chunk, m), v);
      }
      __syncwarp();
      constexpr int RowPieces = RowUnits * G;  // in global order: chunk, m, part
#pragma unroll
      for (int u = 0; u < G; ++u) {
        const int piece_index = u * 32 + lane, row = row0 + piece_index / RowPieces, in_row = piece_index % RowPieces;
        const int piece_part = in_row % Parts, m = in_row / Parts % G, piece_chunk = in_row / (Parts * G);
        uint32_t v[4];
        load_shared_16(v, place_of(row, piece_part, piece_chunk, m));
        // Where the l of a tile are all l of the pattern, a row is one run; otherwise every j has its own.
        const int64_t offset = G == E ? (piece_chunk * E + m) * static_cast<int64_t>(p.d) + piece_part * G : in_row * E;
        store_global_16(static_cast<T*>(p.y) + (at.n0 + Tile::y_row(y_part, row)) * p.y_stride + feature + offset, v);
      }
    }
  }

  __device__ static __noinline__ void write_y_elements(const Product& p, uint32_t ys, T* destination, int rows_j, int rows_l,
                                                       int64_t features) {
#pragma unroll 1
    for (int dj = 0; dj < E && dj < rows_j; ++dj) {
#pragma unroll 1
      for (int dl = 0; dl < G && dl < rows_l; ++dl) {
        const int64_t offset = static_cast<int64_t>(dj) * p.d + dl;
        if (offset < features) destination[offset] = load_shared_element<T>(ys + dl * (Tile::YRows * Tile::YRow) + dj * Size);
      }
    }
  }

  // A step of the pipeline: one tile and one range of k. Steps run on from tile to tile.
  struct Step {
    unsigned tile;
    int s;
    Place at;
  };

  // Returns whether there is a next step; `moved` says whether it belongs to another tile.
  __device__ __forceinline__ bool advance(Step& step, unsigned tiles, bool& moved) const {
    moved = false;
    if (++step.s == steps) {
      step.s = 0;
      step.tile += gridDim.x;
      if (step.tile >= tiles) return false;
      step.at = place(step.tile);
      moved = true;
    }
    return true;
  }

 public:
  __device__ BatchFirstTraffic(const Product& product, uint32_t shared_base) : p(product), shared(shared_base) {}
};

template <typename Tile>
class BatchFirst : BatchFirstTraffic<Tile> {
  using Base = BatchFirstTraffic<Tile>;
  using typename Base::Place, typename Base::Step, typename Base::T, typename Base::XReader, typename Base::WReader;
  using Base::Chunks, Base::G, Base::Size, Base::lane, Base::p, Base::shared, Base::steps;

  const int warp = threadIdx.x / 32;
  const int warp_l = warp % Tile::WarpsL, warp_n = warp / Tile::WarpsL % Tile::WarpsN;
  const int warp_j = warp / (Tile::WarpsL * Tile::WarpsN);

  // ---- products

  using Accumulators = float[Tile::LW][Tile::MN / 16][Tile::MJ / 8][4];
  const int a_row = warp_n * Tile::MN + lane % 16, b_row = warp_j * Tile::MJ + lane % 8 + lane / 16 * 8;

  __device__ __forceinline__ void multiply(Accumulators& acc, int x_stage, int w_stage) const {
    const uint32_t xs = shared + x_stage * Tile::XBytes + warp_l * (Tile::LW * Tile::TN * Tile::KB);
    const uint32_t ws = shared + Tile::WOffset + w_stage * Tile::WBytes + warp_l * (Tile::LW * Tile::TJ * Tile::KB);
    // Operands are loaded one product ahead: a warp has too few neighbours on its scheduler to hide the latency otherwise.
    constexpr int Q = Tile::MJ / 16, M = Tile::MN / 16, Groups = Tile::KB / 32 * Tile::LW;
    Operand<T, Tile::Split> a[2][M], b[2];
    auto load_a = [&](int group) {
      const int s = group / Tile::LW, lw = group % Tile::LW;
      // Sixteen rows further, the swizzle is the same.
      const uint32_t base = xs + swizzled<Chunks>(a_row, 2 * s + lane / 16);
#pragma unroll
      for (int m = 0; m < M; ++m) load_matrix_x4(a[group % 2][m].v, base + (lw * Tile::TN + m * 16) * Tile::KB);
    };
    auto load_b = [&](int product) {
      const int s = product / Q / Tile::LW, lw = product / Q % Tile::LW, q = product % Q;
      const uint32_t base = ws + swizzled<Chunks>(b_row, 2 * s + lane / 8 % 2);
      load_matrix_x4(b[product % 2].v, base + (lw * Tile::TJ + q * 16) * Tile::KB);
    };
    load_a(0);
    load_b(0);
#pragma unroll
    for (int product = 0; product < Groups * Q; ++product) {
      const int group = product / Q, lw = group % Tile::LW, q = product % Q;
      if (product + 1 < Groups * Q) load_b(product + 1);
      if (q == Q - 1 && group + 1 < Groups) load_a(group + 1);
      if (q == 0) {
#pragma unroll
        for (int m = 0; m < M; ++m) prepare(a[group % 2][m]);
      }
      prepare(b[product % 2]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        step(acc[lw][m][2 * q], a[group % 2][m], b[product % 2], 0);
        step(acc[lw][m][2 * q + 1], a[group % 2][m], b[product % 2], 1);
      }
    }
  }

  // ---- y: registers to shared memory (separate)

  // Bias and activation on the way, in parts of j, so that little shared memory is enough.
  __device__ __forceinline__ void finish(Accumulators& acc, const Place& at) const {
#pragma unroll
    for (int part = 0; part < Tile::YParts; ++part) {
      if (part > 0) __syncthreads();  // the part before has left
      if (p.activation == kNone) stage_y<false>(acc, at, part);
      else stage_y<true>(acc, at, part);
      __syncthreads();
      this->write_y(at, part);
    }
  }

  template <bool Activated>
  __device__ __forceinline__ void stage_y(Accumulators& acc, const Place& at, int y_part) const {
    const uint32_t ys = shared + Tile::YOffset + (warp_l * Tile::LW * Tile::TN + warp_n * Tile::MN + lane / 4) * Tile::YRow +
                        (warp_j * Tile::YColumns + lane % 4 * 2) * Size;
#pragma unroll
    for (int lw = 0; lw < Tile::LW; ++lw) {
#pragma unroll
      for (int q = 0; q < Tile::YColumns / 8; ++q) {
        const int tile_q = y_part * (Tile::YColumns / 8) + q;
        float bias[2] = {0.f, 0.f};
        if (p.bias != nullptr) {
          const int l = at.l0 + warp_l * Tile::LW + lw, j = at.j0 + warp_j * Tile::MJ + tile_q * 8 + lane % 4 * 2;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j + r) * p.d + l;
            if (j + r < p.b && l < p.d && feature < p.out_features) bias[r] = to_float(static_cast<const T*>(p.bias)[feature]);
          }
        }
#pragma unroll
        for (int m = 0; m < Tile::MN / 16; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float y0 = acc[lw][m][tile_q][2 * h] + bias[0], y1 = acc[lw][m][tile_q][2 * h + 1] + bias[1];
            if constexpr (Activated) {
              y0 = activate(y0, p.activation);
              y1 = activate(y1, p.activation);
            }
            const uint32_t destination = ys + (lw * Tile::TN + m * 16 + h * 8) * Tile::YRow + q * 8 * Size;
            if constexpr (Size == 4) store_shared_8(destination, __float_as_uint(y0), __float_as_uint(y1));
            else store_shared_4(destination, pack_two<T>(y0, y1));
            acc[lw][m][tile_q][2 * h] = 0.f;
            acc[lw][m][tile_q][2 * h + 1] = 0.f;
          }
        }
      }
    }
  }

 public:
  using Base::Base;

  // While step t is multiplied, x of step t + 1 lies in shared memory, x of step t + 2 is on its way to registers, and w of
  // step t + WStages - 1 on its way to shared memory.
  __device__ __forceinline__ void run(unsigned tiles) const {
    if (blockIdx.x >= tiles) return;
    Step current{blockIdx.x, 0, this->place(blockIdx.x)}, x_step = current, w_step = current;
    Accumulators acc = {};
    uint32_t x[Tile::XPerThread][G * 4];
    bool x_more = true, w_more = true, moved;
    WReader w_next = this->w_reader(w_step.at);
    auto next_w = [&](int stage) {
      if (p.w_aligned) this->template load_w<true>(w_next, stage);
      else this->template load_w<false>(w_next, stage);
      w_more = this->advance(w_step, tiles, moved);
      if (moved) w_next = this->w_reader(w_step.at);
    };
#pragma unroll
    for (int stage = 0; stage < Tile::WStages - 1; ++stage) {
      if (w_more) next_w(stage);
      copy_async_commit();
    }
    XReader reader = this->x_reader(x_step.at);
    this->load_x(x, reader);
    int x_stage = 1, w_stage = 0;
    auto next_x = [&] {
      this->store_x(x, reader, x_step.at, x_stage ^ 1);
      x_more = this->advance(x_step, tiles, moved);
      if (moved) reader = this->x_reader(x_step.at);
      if (x_more) this->load_x(x, reader);
    };
    next_x();
    x_stage = 0;
    while (true) {
      copy_async_wait<Tile::WStages - 2>();
      // Everybody's pieces of this step have landed, and everybody is done with the step before.
      __syncthreads();
      if (w_more) next_w(w_stage == 0 ? Tile::WStages - 1 : w_stage - 1);
      copy_async_commit();
      if (x_more) next_x();
      if (current.at.j0 + warp_j * Tile::MJ < p.b) multiply(acc, x_stage, w_stage);
      if (current.s + 1 == steps) finish(acc, current.at);
      if (!this->advance(current, tiles, moved)) return;
      x_stage ^= 1;
      w_stage = w_stage + 1 == Tile::WStages ? 0 : w_stage + 1;
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1) batch_first_kernel(const __grid_constant__ Product p, unsigned tiles) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchFirst<Tile>(p, shared_address(dynamic_shared)).run(tiles);
}

}  // namespace structlayers
