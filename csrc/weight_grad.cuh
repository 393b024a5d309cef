// Weight gradient of one Kronecker-sparse factor on tensor cores (mma.sync; compute capability 8.0 and later).
//
// Contract: weight_grad.h. Any a, b, c, d >= 1 and any N >= 0, both layouts; float32 (as TF32, or split into two TF32
// numbers), float16, bfloat16; float32 accumulation; the same bits in every run.
//
// Index map: a CTA owns TI neighbouring i, DL neighbouring l, TJ values of j and TK of k, and the rows n of one split. It
// walks over its rows, Rows a step; both operands wait in shared memory as they lie in global memory:
//
//   batch-first  [n][i][j][l] and [n][i][k][l], runs of DL        batch-last  [j][n] and [k][n], DL = TI = 1
//
// Warps divide the tile: along l (WL, each LW of them), i, j (WJ), k (WK), and along the rows of a step (WN). What is added
// over n is the "K" of the tensor core's product, so batch-first both operands are transposed on their way to registers:
// 16-bit with d = 1 by ldmatrix; otherwise a thread reads whole 16-byte pieces, each Sub values of j times LW of l, of two
// or four rows, and permutes them. In which order n and j are dealt out to the fragments is free, as long as both operands
// agree on n, and column() undoes it for j and k:
//
//   lane (g, t) reads piece g of rows t, t + 4, t + 8, t + 12; value s of the piece of group r is column (8 r + g) Sub + s
//
// At the end the WN parts are summed through shared memory and leave as whole rows of k: for dw, or as one of the partial
// sums that weight_grad_sum_kernel adds, in order.
//
// Shared memory: max(Stages * Rows * (TJ + TK) * TI * DL * sizeof(T), 4 * WN * DL * TI * TJ * (TK + Pad)) bytes.
// Preconditions (host): a*c*d and a*b*d < 2^31; rows_per_split a multiple of Rows; 16-byte alignment only where flags say so.
// Source: new.
#pragma once

#include "tile.cuh"
#include "weight_grad.h"

namespace structlayers {

template <typename T_, bool Split_, bool Last_, int DL_, int WI_, int WJ_, int WK_, int WN_, int MJ_, int MK_, int WarpRows_, int Stages_>
struct WeightGradTile {
  using T = T_;
  static constexpr bool Split = Split_, Last = Last_;
  static constexpr int DL = DL_, WJ = WJ_, WK = WK_, WN = WN_, MJ = MJ_, MK = MK_, WarpRows = WarpRows_, Stages = Stages_;
  static constexpr int Size = sizeof(T), E = 16 / Size;
  static constexpr int LW = DL < E ? DL : E, WL = DL / LW, TI = WI_, TJ = WJ * MJ, TK = WK * MK, Rows = WN * WarpRows;
  static constexpr int Threads = 32 * WL * TI * WJ * WK * WN;
  static constexpr int KRows = 32 / Size;                             // rows of one product of the tensor core
  static constexpr bool Pieces = !Last && (DL > 1 || Size == 4);      // operands are read as pieces, not by ldmatrix
  static constexpr int Sub = Pieces ? E / LW : 1;                     // values of j in a piece
  static constexpr int MTiles = Sub > 2 ? Sub / 2 : 1;                // 16 x . tiles whose pieces are read together
  static constexpr int StageBytes = Rows * (TJ + TK) * TI * DL * Size, XOffset = Rows * TJ * TI * DL * Size;
  static constexpr int Pad = 8 / Sub < 4 ? 4 : 8 / Sub, SumRow = TK + Pad, SumBytes = 4 * DL * TI * TJ * SumRow;
  static constexpr int SharedBytes = Stages * StageBytes > WN * SumBytes ? Stages * StageBytes : WN * SumBytes;
  static_assert(DL % LW == 0 && MJ % 16 == 0 && MK % 16 == 0 && WarpRows % KRows == 0 && SharedBytes <= 227 * 1024);
  static_assert(!Pieces || (MJ % (8 * Sub) == 0 && MK % (8 * Sub) == 0));
  static_assert(!Last || (DL == 1 && TI == 1));

  // j within the warp's MJ of row `row` (0 to 15) of tile m; k within MK of column `column` (0 to 7) of tile m.
  __device__ static constexpr int column(int z, int g) { return (z / Sub * 8 + g) * Sub + z % Sub; }
  __device__ static constexpr int row_j(int m, int row) { return column(2 * m + row / 8, row % 8); }
  __device__ static constexpr int column_k(int m, int column_) { return column(m, column_); }
};

// One operand in shared memory: lines of `Chunks` 16-byte pieces, swizzled for the way in which they are read.
template <typename Tile, int Columns>
struct OperandLines {
  static constexpr int Lines = Tile::Last ? Columns : Tile::Rows;
  static constexpr int Bytes = (Tile::Last ? Tile::Rows : Tile::TI * Columns * Tile::DL) * Tile::Size;
  static constexpr int Chunks = Bytes / 16;
  static_assert(Bytes % 128 == 0);

  // What the number of a piece is combined with, so that the lanes that read together fall in different bank groups.
  __device__ static __forceinline__ int mixed(int line) {
    if constexpr (!Tile::Pieces) return line & 7;
    else if constexpr (Tile::WL == 1) return (line & 3) << 1;
    else if constexpr (Tile::WL == 2) return (line & 1) | (line & 2) << 1;
    else return line & 3;
  }
  __device__ static __forceinline__ uint32_t place(int line, int chunk) {
    return static_cast<uint32_t>(line * Bytes + ((chunk ^ mixed(line)) << 4));
  }
};

// The corner of a CTA's tile.
struct GradCorner {
  int i, l, j, k;
};

// What a thread copies of every step: lines LineStep apart, always the same piece of them. `first` is the tile's first j or k.
template <typename Tile, int Columns>
class OperandCopy {
  using T = typename Tile::T;
  using Lines = OperandLines<Tile, Columns>;
  static constexpr int E = Tile::E, Size = Tile::Size, DL = Tile::DL;
  static constexpr int LineStep = Tile::Threads / Lines::Chunks, PerThread = Lines::Lines / LineStep;
  static_assert(Tile::Threads % Lines::Chunks == 0 && Lines::Lines % LineStep == 0 && (LineStep & (LineStep - 1)) == 0);

  const T* source;
  int valid;  // batch-first: bytes of the piece that exist; batch-last: lines that exist, from the first

  // Of a line along [i][j][l] of the tile, or of a batch-last one that is [j]: where value `flat` of it lies in the factor.
  struct Where {
    int left_j, left_l;  // values of j and l from here on
    int64_t feature, left;  // logical features from here on
  };
  __device__ static __forceinline__ Where where(const GradOperand& operand, int a, int d, const GradCorner& corner, int first, int flat) {
    const int i = corner.i + flat / (Columns * DL), j = first + flat / DL % Columns, l = corner.l + flat % DL;
    const int64_t feature = (static_cast<int64_t>(i) * operand.block + j) * d + l;
    return {i < a ? operand.block - j : 0, d - l, feature, operand.features - feature};
  }

  // Runs of l are whole pieces, or all l of the pattern lie together; otherwise values travel one by one. A piece may reach
  // into the next block, whose values then meet columns that nobody keeps.
  __device__ static __forceinline__ bool takes_pieces(const GradOperand& operand, int d) {
    return operand.aligned && (Tile::Last || (Tile::LW == E ? d % E == 0 : d == DL));
  }

 public:
  __device__ __forceinline__ OperandCopy(const GradOperand& operand, int a, int d, const GradCorner& corner, int first, int64_t n0) {
    const int line = threadIdx.x / Lines::Chunks, chunk = threadIdx.x % Lines::Chunks;
    const Where at = where(operand, a, d, corner, first, Tile::Last ? line : chunk * E);
    const bool exists = at.left_j > 0 && at.left_l > 0 && at.left > 0;
    const T* data = static_cast<const T*>(operand.data);
    if constexpr (Tile::Last) {
      valid = exists ? static_cast<int>(min(int64_t{at.left_j}, (at.left + d - 1) / d)) : 0;
      source = data + at.feature * operand.stride + n0 + chunk * E;
    } else {
      valid = exists ? static_cast<int>(min(at.left, int64_t{E})) * Size : 0;
      source = data + (n0 + line) * operand.stride + at.feature;
    }
  }

  // The next step, of which `rows` rows exist; what does not exist becomes zero.
  __device__ __forceinline__ void start(uint32_t destination, int rows, const GradOperand& operand, int a, int d, const GradCorner& corner,
                                        int first) {
    int thread = threadIdx.x;
    int64_t line_stride = LineStep * operand.stride * (Tile::Last ? d : 1);
    // Hides where these come from: kept from step to step, all that follows from them would fill the registers.
    asm volatile("" : "+r"(thread), "+l"(line_stride));
    const int line = thread / Lines::Chunks, chunk = thread % Lines::Chunks;
    if (takes_pieces(operand, d)) {
      const T* from = source;
      const uint32_t place = destination + Lines::place(line, chunk);
      const int bytes = Tile::Last ? min(rows - chunk * E, E) * Size : valid;
#pragma unroll
      for (int u = 0; u < PerThread; ++u) {
        const bool inside = Tile::Last ? u * LineStep < valid && bytes > 0 : line + u * LineStep < rows && valid > 0;
        // A line's bits and those of the step between lines are apart, so that they mix one after the other.
        const uint32_t to = (place ^ (Lines::mixed(u * LineStep) << 4)) + u * LineStep * Lines::Bytes;
        copy_async_16(to, inside ? from : operand.data, inside ? bytes : 0);
        from += line_stride;
      }
    } else {
      copy_values(source, valid, destination, rows, operand, a, d, corner, first);
    }
    source += Tile::Last ? Tile::Rows : Tile::Rows * operand.stride;
  }

 private:
  __device__ static __forceinline__ void copy_values(const T* source, int valid, uint32_t destination, int rows, const GradOperand& operand,
                                                  int a, int d, const GradCorner& corner, int first) {
    constexpr int Run = Tile::Last ? 1 : Tile::LW;
    const int line = threadIdx.x / Lines::Chunks, chunk = threadIdx.x % Lines::Chunks;
    const Where piece = where(operand, a, d, corner, first, Tile::Last ? line : chunk * E);
#pragma unroll 1
    for (int u = 0; u < PerThread; ++u) {
      const int at = line + u * LineStep;
      const T* from = source + u * LineStep * operand.stride * (Tile::Last ? d : 1);
      const bool inside = Tile::Last ? u * LineStep < valid : at < rows && valid > 0;
      uint32_t bits[E], v[4];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if constexpr (Tile::Last) {
          bits[e] = inside && chunk * E + e < rows ? load_bits<Size>(from, e) : 0;
        } else {
          const int j = e / Run, l = e % Run;
          const int64_t offset = static_cast<int64_t>(j) * d + l;
          bits[e] = inside && j < piece.left_j && l < piece.left_l && offset < piece.left ? load_bits<Size>(from, offset) : 0;
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] = Size == 4 ? bits[r] : bits[2 * r % E] | bits[(2 * r + 1) % E] << 16;
      store_shared_16(destination + Lines::place(at, chunk), v);
    }
  }
};

template <typename Tile>
class WeightGradKernel {
  using T = typename Tile::T;
  using Fragment = Operand<T, Tile::Split>;
  using DyLines = OperandLines<Tile, Tile::TJ>;
  using XLines = OperandLines<Tile, Tile::TK>;
  static constexpr int E = Tile::E, Sub = Tile::Sub, LW = Tile::LW, KRows = Tile::KRows;
  static constexpr int JTiles = Tile::MJ / 16, KTiles = Tile::MK / 8;

  const WeightGrad& p;
  unsigned char* const buffer;
  const uint32_t shared = shared_address(buffer);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_k = warp % Tile::WK, warp_j = warp / Tile::WK % Tile::WJ, warp_i = warp / (Tile::WK * Tile::WJ) % Tile::TI;
  const int warp_l = warp / (Tile::WK * Tile::WJ * Tile::TI) % Tile::WL, warp_n = warp / (Tile::WK * Tile::WJ * Tile::TI * Tile::WL);
  float acc[LW][JTiles][KTiles][4] = {};

  // Bytes from the start of an operand's lines to what this lane reads first.
  template <typename Lines, int Columns>
  __device__ __forceinline__ uint32_t first_place(int column0, bool is_dy) const {
    const int row0 = warp_n * Tile::WarpRows;
    // ldmatrix: which of its four 8 x 8 matrices lie further along the columns, and which further along n.
    const int low = lane / 8 % 2, high = lane / 16;
    const int next_column = is_dy ? low : high, next_n = is_dy ? high : low;
    if constexpr (Tile::Pieces) {
      const int flat = (warp_i * Columns + column0) * Tile::DL / E;
      return Lines::place(row0 + lane % 4, flat + lane / 4 * Tile::WL + warp_l);
    } else if constexpr (Tile::Last) {
      return Lines::place(column0 + lane % 8 + next_column * 8, row0 / E + next_n);
    } else {
      return Lines::place(row0 + lane % 8 + next_n * 8, (warp_i * Columns + column0) / E + next_column);
    }
  }

  // What ldmatrix reads, `column` columns and `step` products further than the first place; always an even number of pieces.
  template <typename Lines>
  __device__ __forceinline__ uint32_t further(uint32_t place, int column, int step) const {
    if constexpr (Tile::Last) return shifted(place, step * 2) + column * Lines::Bytes;
    else return shifted(place, column / E) + step * KRows * Lines::Bytes;
  }

  // The number of a piece is mixed with that of its line. Where a warp begins at a multiple of all that it adds, adding is
  // mixing, and what is added is known when this is compiled.
  __device__ __forceinline__ uint32_t shifted(uint32_t place, int pieces) const {
    if constexpr ((Tile::MJ & (Tile::MJ - 1)) == 0 && (Tile::MK & (Tile::MK - 1)) == 0) {
      return (place ^ (pieces % 8 << 4)) + pieces / 8 * 128;
    } else {
      const uint32_t mixed = lane % 8 << 4;
      return ((place ^ mixed) + pieces * 16) ^ mixed;
    }
  }

  __device__ static __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t place) {
    if constexpr (Tile::Last) load_matrix_x4(v, place);
    else load_matrix_x4_transposed(v, place);
  }

  // The E values of a piece in rows t and t + 4 (first), t + 8 and t + 12 (second); 32-bit: t (first), t + 4 (second).
  template <typename Lines>
  __device__ static __forceinline__ void load_pieces(uint32_t (&first)[E], uint32_t (&second)[E], uint32_t place) {
    uint32_t raw[KRows / 4][4];
#pragma unroll
    for (int r = 0; r < KRows / 4; ++r) load_shared_16(raw[r], place + r * 4 * Lines::Bytes);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if constexpr (Tile::Size == 4) {
        first[e] = raw[0][e];
        second[e] = raw[1][e];
      } else {
        const unsigned pair = e % 2 ? 0x7632 : 0x5410;
        first[e] = __byte_perm(raw[0][e / 2], raw[1][e / 2], pair);
        second[e] = __byte_perm(raw[KRows / 4 - 2][e / 2], raw[KRows / 4 - 1][e / 2], pair);
      }
    }
  }

  __device__ __forceinline__ void load_dy(Fragment (&dy)[Tile::MTiles][LW], uint32_t place, int m, int step) const {
    if constexpr (Tile::Pieces) {
      constexpr int Groups = Sub == 1 ? 2 : 1;
      uint32_t first[Groups][E], second[Groups][E];
#pragma unroll
      for (int r = 0; r < Groups; ++r) {
        load_pieces<DyLines>(first[r], second[r], place + step * KRows * DyLines::Bytes + (2 * m / Sub + r) * Tile::WL * 128);
      }
#pragma unroll
      for (int q = 0; q < Tile::MTiles; ++q)
#pragma unroll
        for (int l = 0; l < LW; ++l)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int z = 2 * q + half, e = z % Sub * LW + l;
            dy[q][l].v[half] = first[z / Sub][e];
            dy[q][l].v[2 + half] = second[z / Sub][e];
          }
    } else {
      load_matrices(dy[0][0].v, further<DyLines>(place, m * 16, step));
    }
#pragma unroll
    for (int q = 0; q < Tile::MTiles; ++q)
#pragma unroll
      for (int l = 0; l < LW; ++l) prepare(dy[q][l]);
  }

  // Two tiles of 8 values of k in each fragment.
  __device__ __forceinline__ void load_x(Fragment (&x)[LW][KTiles / 2], uint32_t place, int step) const {
    if constexpr (Tile::Pieces) {
#pragma unroll
      for (int r = 0; r < KTiles / Sub; ++r) {
        uint32_t first[E], second[E];
        load_pieces<XLines>(first, second, place + step * KRows * XLines::Bytes + r * Tile::WL * 128);
#pragma unroll
        for (int s = 0; s < Sub; ++s)
#pragma unroll
          for (int l = 0; l < LW; ++l) {
            const int z = r * Sub + s;
            x[l][z / 2].v[z % 2 * 2] = first[s * LW + l];
            x[l][z / 2].v[z % 2 * 2 + 1] = second[s * LW + l];
          }
      }
    } else {
#pragma unroll
      for (int z = 0; z < KTiles / 2; ++z) load_matrices(x[0][z].v, further<XLines>(place, z * 16, step));
    }
#pragma unroll
    for (int l = 0; l < LW; ++l)
#pragma unroll
      for (int z = 0; z < KTiles / 2; ++z) prepare(x[l][z]);
  }

  __device__ __forceinline__ void multiply(uint32_t dy_place, uint32_t x_place) {
#pragma unroll(Tile::Split ? 1 : 2)
    for (int step_ = 0; step_ < Tile::WarpRows / KRows; ++step_) {
      Fragment x[LW][KTiles / 2];
      load_x(x, x_place, step_);
#pragma unroll
      for (int m = 0; m < JTiles; m += Tile::MTiles) {
        // Read all at once, the operands of eight l would not fit the registers.
        if constexpr (LW * Tile::Size >= 16) __syncwarp();
        Fragment dy[Tile::MTiles][LW];
        load_dy(dy, dy_place, m, step_);
#pragma unroll
        for (int q = 0; q < Tile::MTiles; ++q)
#pragma unroll
          for (int l = 0; l < LW; ++l)
#pragma unroll
            for (int z = 0; z < KTiles; ++z) step<T, Tile::Split>(acc[l][m + q][z], dy[q][l], x[l][z / 2], z % 2);
      }
    }
  }

  // ---- out: registers, shared memory [part of n][l][i][j][k], global memory

  __device__ __forceinline__ void store_sums() const {
    float* sums = reinterpret_cast<float*>(buffer);
#pragma unroll
    for (int l = 0; l < LW; ++l) {
      const int block = (warp_n * Tile::DL + warp_l * LW + l) * Tile::TI + warp_i;
#pragma unroll
      for (int m = 0; m < JTiles; ++m)
#pragma unroll
        for (int z = 0; z < KTiles; ++z)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = warp_j * Tile::MJ + Tile::row_j(m, half * 8 + lane / 4);
            const int k = warp_k * Tile::MK + Tile::column_k(z, lane % 4 * 2);
            float* to = sums + (block * Tile::TJ + j) * Tile::SumRow + k;
            if constexpr (Sub == 1) {
              *reinterpret_cast<float2*>(to) = make_float2(acc[l][m][z][2 * half], acc[l][m][z][2 * half + 1]);
            } else {
              to[0] = acc[l][m][z][2 * half];
              to[Sub] = acc[l][m][z][2 * half + 1];
            }
          }
    }
  }

  __device__ __forceinline__ void write_sums(const GradCorner& corner, unsigned split) const {
    const float* sums = reinterpret_cast<const float*>(buffer);
    const int b = p.dy.block, c = p.x.block;
    const int64_t elements = static_cast<int64_t>(p.a) * p.d * b * c;
    constexpr int Quads = Tile::TK / 4;
#pragma unroll 1
    for (int unit = threadIdx.x; unit < Tile::DL * Tile::TI * Tile::TJ * Quads; unit += Tile::Threads) {
      const int quad = unit % Quads, j = unit / Quads % Tile::TJ, block = unit / (Quads * Tile::TJ);
      const int i = corner.i + block % Tile::TI, l = corner.l + block / Tile::TI, k = corner.k + quad * 4;
      if (i >= p.a || l >= p.d || corner.j + j >= b || k >= c) continue;
      float sum[4] = {};
#pragma unroll
      for (int part = 0; part < Tile::WN; ++part) {
        const float4 v = *reinterpret_cast<const float4*>(sums + part * (Tile::SumBytes / 4) + (block * Tile::TJ + j) * Tile::SumRow + quad * 4);
        sum[0] += v.x;
        sum[1] += v.y;
        sum[2] += v.z;
        sum[3] += v.w;
      }
      const int64_t index = ((static_cast<int64_t>(i) * p.d + l) * b + corner.j + j) * c + k;
      if (p.partial != nullptr) {
        float* to = p.partial + split * elements + index;
        if (c % 4 == 0) {
          *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
          for (int e = 0; e < 4 && k + e < c; ++e) to[e] = sum[e];
        }
      } else {
        T* to = static_cast<T*>(p.dw) + index;
        if (c % 4 != 0) {
          for (int e = 0; e < 4 && k + e < c; ++e) to[e] = from_float<T>(sum[e]);
        } else if constexpr (Tile::Size == 4) {
          *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
          *reinterpret_cast<uint2*>(to) = make_uint2(pack_two<T>(sum[0], sum[1]), pack_two<T>(sum[2], sum[3]));
        }
      }
    }
  }

 public:
  __device__ __forceinline__ WeightGradKernel(const WeightGrad& p_, unsigned char* buffer_) : p(p_), buffer(buffer_) {}

  __device__ __forceinline__ void run() {
    // CTAs that read the same rows run together: tiles of one split are neighbours.
    const unsigned tiles_k = (p.x.block + Tile::TK - 1) / Tile::TK, tiles_j = (p.dy.block + Tile::TJ - 1) / Tile::TJ;
    const unsigned tiles_l = (p.d + Tile::DL - 1) / Tile::DL, tiles_i = (p.a + Tile::TI - 1) / Tile::TI;
    unsigned tile = blockIdx.x;
    GradCorner corner;
    corner.k = tile % tiles_k * Tile::TK;
    tile /= tiles_k;
    corner.j = tile % tiles_j * Tile::TJ;
    tile /= tiles_j;
    corner.l = tile % tiles_l * Tile::DL;
    tile /= tiles_l;
    corner.i = tile % tiles_i * Tile::TI;
    const unsigned split = tile / tiles_i;

    const int64_t n0 = split * p.rows_per_split;
    int64_t left = max(min(p.n - n0, p.rows_per_split), int64_t{0});  // rows that are still to be copied
    const int steps = static_cast<int>((left + Tile::Rows - 1) / Tile::Rows);
    OperandCopy<Tile, Tile::TJ> dy(p.dy, p.a, p.d, corner, corner.j, n0);
    OperandCopy<Tile, Tile::TK> x(p.x, p.a, p.d, corner, corner.k, n0);
    const auto start = [&](uint32_t stage) {
      const int rows = static_cast<int>(min(left, int64_t{Tile::Rows}));
      if (rows > 0) {
        dy.start(stage, rows, p.dy, p.a, p.d, corner, corner.j);
        x.start(stage + Tile::XOffset, rows, p.x, p.a, p.d, corner, corner.k);
      }
      left -= rows;
      copy_async_commit();
    };
    uint32_t writes = shared, reads = shared;
    const uint32_t end = shared + Tile::Stages * Tile::StageBytes;
    const auto advance = [&](uint32_t& stage) {
      stage += Tile::StageBytes;
      if (stage == end) stage = shared;
    };
#pragma unroll 1
    for (int stage = 0; stage < Tile::Stages - 1; ++stage) {
      start(writes);
      advance(writes);
    }
    const uint32_t dy_place = first_place<DyLines, Tile::TJ>(warp_j * Tile::MJ, true);
    const uint32_t x_place = Tile::XOffset + first_place<XLines, Tile::TK>(warp_k * Tile::MK, false);
#pragma unroll 1
    for (int step_ = 0; step_ < steps; ++step_) {
      copy_async_wait<Tile::Stages - 2>();
      __syncthreads();
      start(writes);
      advance(writes);
      multiply(reads + dy_place, reads + x_place);
      advance(reads);
    }
    copy_async_wait<0>();
    __syncthreads();
    store_sums();
    __syncthreads();
    write_sums(corner, split);
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1) weight_grad_kernel(const __grid_constant__ WeightGrad p) {
  extern __shared__ __align__(128) unsigned char buffer[];
  WeightGradKernel<Tile>(p, buffer).run();
}

// Tiny blocks (b, c <= B), by plain multiply-adds: a tensor-core tile would be mostly padding. A thread adds for one block
// (i, l) over some rows of a split. Batch-first a CTA takes 32 blocks, and each of its warps every eighth row; batch-last a
// warp takes one block, and each of its lanes every 32nd row. The sums meet in shared memory.
template <typename T, int B, bool Last>
__global__ void __launch_bounds__(256) weight_grad_small_kernel(const __grid_constant__ WeightGrad p) {
  constexpr int Owners = Last ? 8 : 32, Parts = 256 / Owners;
  __shared__ float sums[B * B][Parts][Owners + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int owner = Last ? warp : lane, part = Last ? lane : warp;
  const int64_t blocks = static_cast<int64_t>(p.a) * p.d, groups = (blocks + Owners - 1) / Owners;
  const int64_t block0 = blockIdx.x % groups * Owners, block = block0 + owner, split = blockIdx.x / groups;
  const int64_t i = block / p.d, l = block % p.d;
  const T* dy = static_cast<const T*>(p.dy.data);
  const T* x = static_cast<const T*>(p.x.data);
  const int b = p.dy.block, c = p.x.block;
  const int64_t dy_feature = i * b * p.d + l, x_feature = i * c * p.d + l;
  const int64_t begin = split * p.rows_per_split, end = min(begin + p.rows_per_split, p.n);
  bool has_dy[B], has_x[B];
#pragma unroll
  for (int j = 0; j < B; ++j) {
    has_dy[j] = block < blocks && j < b && dy_feature + static_cast<int64_t>(j) * p.d < p.dy.features;
    has_x[j] = block < blocks && j < c && x_feature + static_cast<int64_t>(j) * p.d < p.x.features;
  }
  const auto value = [](const T* data, int64_t stride, int64_t n, int64_t feature) {
    return to_float(data[Last ? feature * stride + n : n * stride + feature]);
  };
  float acc[B][B] = {};
#pragma unroll 4
  for (int64_t n = begin + part; n < end; n += Parts) {
    float rows[B], columns[B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      rows[j] = has_dy[j] ? value(dy, p.dy.stride, n, dy_feature + static_cast<int64_t>(j) * p.d) : 0.f;
      columns[j] = has_x[j] ? value(x, p.x.stride, n, x_feature + static_cast<int64_t>(j) * p.d) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < B; ++j)
#pragma unroll
      for (int k = 0; k < B; ++k) acc[j][k] = fmaf(rows[j], columns[k], acc[j][k]);
  }
#pragma unroll
  for (int e = 0; e < B * B; ++e) sums[e][part][owner] = acc[e / B][e % B];
  __syncthreads();
  for (int unit = threadIdx.x; unit < B * B * Owners; unit += 256) {
    const int element = unit % (B * B), from = unit / (B * B), j = element / B, k = element % B;
    if (block0 + from >= blocks || j >= b || k >= c) continue;
    float sum = 0.f;
#pragma unroll
    for (int q = 0; q < Parts; ++q) sum += sums[element][q][from];
    const int64_t index = ((block0 + from) * b + j) * c + k;
    if (p.partial != nullptr) p.partial[split * blocks * b * c + index] = sum;
    else static_cast<T*>(p.dw)[index] = from_float<T>(sum);
  }
}

// dw from the partial sums. A warp takes 32 * V neighbouring elements and every Parts-th split; the order is always the same.
template <typename T, int V, int Parts>
__global__ void __launch_bounds__(256)
    weight_grad_sum_kernel(const float* __restrict__ partial, T* __restrict__ dw, int64_t elements, int splits) {
  constexpr int Groups = 8 / Parts;
  __shared__ float sums[Parts][V][Groups * 32];
  const int thread = threadIdx.x % (Groups * 32), part = threadIdx.x / (Groups * 32);
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * (Groups * 32) + thread) * V;
  float sum[V] = {};
  if (index < elements) {
#pragma unroll 4
    for (int split = part; split < splits; split += Parts) {
      const float* from = partial + split * elements + index;
      if constexpr (V == 4) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        sum[0] += v.x;
        sum[1] += v.y;
        sum[2] += v.z;
        sum[3] += v.w;
      } else {
        sum[0] += *from;
      }
    }
  }
  if constexpr (Parts > 1) {
#pragma unroll
    for (int e = 0; e < V; ++e) sums[part][e][thread] = sum[e];
    __syncthreads();
    if (part > 0) return;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sum[e] = 0.f;
#pragma unroll
      for (int q = 0; q < Parts; ++q) sum[e] += sums[q][e][thread];
    }
  }
  if (index >= elements) return;
  if constexpr (V == 4 && sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(dw + index) = make_uint2(pack_two<T>(sum[0], sum[1]), pack_two<T>(sum[2], sum[3]));
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) dw[index + e] = from_float<T>(sum[e]);
  }
}

}  // namespace structlayers
