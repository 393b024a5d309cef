// Batch-first product with one Kronecker-sparse factor on Hopper's asynchronous tensor cores (wgmma, sm_90a); 16-bit types.
//
// Contract and tiles: batch_first.cuh. What differs:
// - x travels to shared memory as it lies (cp.async, RawStages steps deep), and from there, one step before it is needed,
//   through registers to its separate form; nothing waits in registers for global memory.
// - Two warpgroups; each multiplies 64 values of j by the TN rows of DL/2 neighbouring l (or of one l and its own 64 values
//   of j, where DL = 1), A = w and B = x straight from shared memory, while its threads convert the next step.
// - The first warpgroup fetches w, the second x, so that the two are waited for apart.
//
//   raw x [n][k][l]  ->  x [l][n][k]     w [l][j][k]     D[j][n] in registers  ->  y [l][n][j]  ->  global memory
//
// - A stage of w holds WSteps steps, so that its rows are read 64 bytes and more at a time: the L2 counts requests.
//
// Shared memory: DL * ((RawStages + 2) * TN + WSteps * WStages * TJ) * KB + DL * TN / YParts * (TJ * sizeof(T) + 16) bytes
// (DL = 1: without the 2; raw x is the operand).
#pragma once

#include "batch_first.cuh"
#include "wgmma.cuh"

namespace structlayers {

template <typename T_, int DL_, int TN_, int KB_, int RawStages_, int WSteps_, int WStages_, int YParts_>
struct HopperTile {
  using T = T_;
  static constexpr int DL = DL_, TN = TN_, KB = KB_, RawStages = RawStages_, WSteps = WSteps_, WStages = WStages_;
  static constexpr int YParts = YParts_;
  static constexpr bool Direct = DL == 1;  // raw x is already the operand
  static constexpr int TJ = Direct ? 128 : 64, Threads = 256, WThreads = 128, LW = Direct ? 1 : DL / 2;
  static constexpr int Size = sizeof(T), E = 16 / Size, K = KB / Size, Chunks = KB / 16;
  static constexpr int G = DL < E ? DL : E, Parts = DL / G;
  static constexpr int XBytes = DL * TN * KB, WBytes = DL * TJ * KB * WSteps;
  static constexpr int YRow = TJ * Size + 16, YRows = TN / YParts, YPieces = TJ / E;
  static constexpr bool BouncesY = DL > 1;
  __device__ static int y_row(int part, int row) { return part * YRows + row; }
  __device__ static int y_column(int, int column) { return column; }
  static constexpr int XOffset = RawStages * XBytes, WOffset = XOffset + (Direct ? 0 : 2 * XBytes);
  static constexpr int YOffset = WOffset + WStages * WBytes;
  static constexpr int SharedBytes = YOffset + DL * YRows * YRow;
  static constexpr int XUnits = TN * Chunks * Parts, XPerThread = (XUnits + Threads - 1) / Threads;
  static constexpr int WUnits = DL * TJ * Chunks * WSteps;
  static constexpr int RowChunks = K * DL / E;  // 16-byte pieces of a row of raw x
  static_assert(Size == 2 && YRows % 8 == 0 && LW * YRows % 16 == 0 && LW * TN <= 256 && RowChunks <= 128);
  static_assert(RawStages >= 3 && WStages >= 2 && TN * RowChunks % 128 == 0);
};

template <typename Tile>
class BatchFirstHopper : BatchFirstTraffic<Tile> {
  using Base = BatchFirstTraffic<Tile>;
  using typename Base::Place, typename Base::Step, typename Base::T, typename Base::Unit, typename Base::WReader;
  using Base::E, Base::G, Base::Size, Base::lane, Base::p, Base::shared, Base::steps, Base::whole_runs, Base::WRowBytes;

  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  // The first l of this warpgroup and the first of its values of j within the tile.
  const int first_l = Tile::DL == 1 ? 0 : group * Tile::LW, first_j = Tile::DL == 1 ? group * 64 : 0;

  // ---- x: global memory to shared memory as it lies, then separate

  // Where the second warpgroup reads: one 16-byte piece of rows RowStep apart. Moves on by one step at a time.
  static constexpr int RowStep = 128 / Tile::RowChunks;
  const int raw_row = threadIdx.x % 128 / Tile::RowChunks, raw_chunk = threadIdx.x % Tile::RowChunks;

  struct RawReader {
    const T* source;
    int64_t left;  // elements from `source` on that exist in this row of x
    int64_t n;     // first row
    int i, k, l;   // of the first element
  };

  __device__ __forceinline__ RawReader raw_reader(const Place& at) const {
    RawReader r;
    r.n = at.n0 + raw_row;
    r.i = at.i;
    r.k = raw_chunk * E / Tile::DL;
    r.l = at.l0 + raw_chunk * E % Tile::DL;
    const int64_t column = (static_cast<int64_t>(at.i) * p.c + r.k) * p.d + r.l;
    r.source = static_cast<const T*>(p.x) + r.n * p.x_stride + column;
    // Up to the end of this i, and of the logical input.
    const int64_t end = min((static_cast<int64_t>(at.i) + 1) * p.c * p.d, p.in_features);
    r.left = r.l < p.d ? end - column : 0;
    return r;
  }

  // The place of piece `chunk` of `row`: the pieces that eight neighbouring threads convert at a time lie in different banks.
  __device__ static __forceinline__ uint32_t raw_offset(int row, int chunk) {
    if constexpr (Tile::Direct) return swizzled<Tile::Chunks>(row, chunk);
    const int q = row * Tile::RowChunks + chunk;
    return (Tile::DL > E ? q ^ (((q >> 4) & 3) << 1) : q ^ ((q >> 3) & (G - 1))) * 16;
  }

  template <bool Whole>
  __device__ __forceinline__ void load_raw(RawReader& r, int stage) const {
    const uint32_t base = shared + stage * Tile::XBytes;
    const int valid = static_cast<int>(max(int64_t{0}, min(r.left, int64_t{E})));
#pragma unroll
    for (int u = 0; u < Tile::TN * Tile::RowChunks / 128; ++u) {
      const uint32_t destination = base + raw_offset(raw_row + u * RowStep, raw_chunk);
      const bool inside = r.n + u * RowStep < p.n;
      if constexpr (Whole) {
        const T* source = r.source + u * RowStep * p.x_stride;
        copy_async_16(destination, inside && valid > 0 ? source : p.x, inside ? valid * Size : 0);
      } else {
        copy_raw_elements(p, destination, inside ? r.n + u * RowStep : -1, r.i, r.k, r.l);
      }
    }
    r.source += static_cast<int64_t>(Tile::K) * p.d;
    r.left -= static_cast<int64_t>(Tile::K) * p.d;
    r.k += Tile::K;
  }

  // A piece of a pattern whose runs of l are not whole pieces, or where nothing is aligned: element by element.
  __device__ static __noinline__ void copy_raw_elements(const Product& p, uint32_t destination, int64_t n, int i, int k0, int l0) {
#pragma unroll 1
    for (int e = 0; e < E; ++e) {
      const int k = k0 + e / G, l = l0 + e % G;
      const int64_t column = (static_cast<int64_t>(i) * p.c + k) * p.d + l;
      const bool inside = n >= 0 && k < p.c && l < p.d && column < p.in_features;
      store_shared_element<Size>(destination + e * Size, inside ? load_bits<Size>(p.x, n * p.x_stride + column) : 0);
    }
  }

  __device__ __forceinline__ void convert(int raw_stage, int x_stage) const {
    const uint32_t raw = shared + raw_stage * Tile::XBytes;
    const uint32_t xs = shared + Tile::XOffset + x_stage * Tile::XBytes;
#pragma unroll
    for (int u = 0; u < Tile::XPerThread; ++u) {
      const int unit = threadIdx.x + u * Tile::Threads;
      if (Tile::XUnits % Tile::Threads != 0 && unit >= Tile::XUnits) return;
      const int part = unit % Tile::Parts, chunk = unit / Tile::Parts % Tile::Chunks, row = unit / (Tile::Parts * Tile::Chunks);
      uint32_t flat[G * 4], separate[G][4];
#pragma unroll
      for (int m = 0; m < G; ++m) {
        uint32_t v[4];
        load_shared_16(v, raw + raw_offset(row, (chunk * G + m) * Tile::Parts + part));
#pragma unroll
        for (int r = 0; r < 4; ++r) flat[4 * m + r] = v[r];
      }
      Unit::separate(flat, separate);
      const uint32_t destination = xs + part * G * (Tile::TN * Tile::KB) + swizzled<Tile::Chunks>(row, chunk);
#pragma unroll
      for (int l = 0; l < G; ++l) store_shared_16(destination + l * (Tile::TN * Tile::KB), separate[l]);
    }
  }

  // ---- products

  using Accumulators = float[Tile::LW][Tile::TN / 8][4];

  // Starts the products of one step; `fresh` drops what the accumulators held.
  __device__ __forceinline__ void multiply(Accumulators& acc, int x_stage, int w_stage, int w_part, bool fresh) const {
    const uint32_t xs = shared + Tile::XOffset * !Tile::Direct + x_stage * Tile::XBytes + first_l * (Tile::TN * Tile::KB);
    const uint32_t ws = shared + Tile::WOffset + w_stage * Tile::WBytes + (first_l * Tile::TJ + first_j) * WRowBytes +
                        w_part * Tile::KB;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < Tile::KB / 32; ++s) {
#pragma unroll
      for (int l = 0; l < Tile::LW; ++l) {
        Wgmma<T, Tile::TN>::multiply(acc[l], wgmma_descriptor<WRowBytes>(ws + l * (Tile::TJ * WRowBytes) + s * 32),
                                     wgmma_descriptor<Tile::KB>(xs + l * (Tile::TN * Tile::KB) + s * 32), fresh && s == 0);
      }
    }
    wgmma_commit();
  }

  template <bool Activated>
  __device__ __forceinline__ void stage_y(Accumulators& acc, const Place& at, int y_part) const {
    const int j = first_j + warp * 16;
    // Lane t of stmatrix gives the row of matrix t / 8: 8 rows n by 8 values of j.
    const uint32_t ys = shared + Tile::YOffset + (first_l * Tile::YRows + lane / 16 * 8 + lane % 8) * Tile::YRow +
                        (j + lane / 8 % 2 * 8) * Size;
    float bias[Tile::LW][2] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int l = 0; l < Tile::LW; ++l) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = at.j0 + j + lane / 4 + h * 8, run = at.l0 + first_l + l;
          const int64_t feature = (static_cast<int64_t>(at.i) * p.b + row) * p.d + run;
          if (row < p.b && run < p.d && feature < p.out_features) bias[l][h] = to_float(static_cast<const T*>(p.bias)[feature]);
        }
      }
    }
    // Blocks of 8 rows n, of all l one after the other, as they follow each other in shared memory; two at a time.
    constexpr int Blocks = Tile::YRows / 8;
#pragma unroll
    for (int block = 0; block < Tile::LW * Blocks; block += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int l = (block + m / 2) / Blocks, q = y_part * Blocks + (block + m / 2) % Blocks;
        float z0 = acc[l][q][m % 2 * 2] + bias[l][m % 2], z1 = acc[l][q][m % 2 * 2 + 1] + bias[l][m % 2];
        if constexpr (Activated) {
          z0 = activate(z0, p.activation);
          z1 = activate(z1, p.activation);
        }
        packed[m] = pack_two<T>(z0, z1);
      }
      store_matrix_x4_transposed(ys + block * 8 * Tile::YRow, packed);
    }
  }

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

 public:
  using Base::Base;

  // While step t is multiplied, step t + 1 of x is converted, and what follows is on its way to shared memory: x up to step
  // t + RawStages, w up to step t + WStages - 1.
  __device__ __forceinline__ void run(unsigned tiles) const {
    if (blockIdx.x >= tiles) return;
    constexpr int RawAhead = Tile::Direct ? Tile::RawStages - 1 : Tile::RawStages;
    const bool fetches_w = group == 0, whole = p.x_aligned && whole_runs;
    Step current{blockIdx.x, 0, this->place(blockIdx.x)}, fetch = current;
    WReader w_next = this->w_reader(fetch.at);
    RawReader raw_next = raw_reader(fetch.at);
    bool more = true, moved;
    auto fetch_next = [&](int stage) {
      if (more) {
        if (fetches_w) {
          if (p.w_aligned) this->template load_w<true>(w_next, stage);
          else this->template load_w<false>(w_next, stage);
          // On to the last step of this stage, or of the tile.
          fetch.s = min(fetch.s + Tile::WSteps, steps) - 1;
        } else {
          if (whole) load_raw<true>(raw_next, stage);
          else load_raw<false>(raw_next, stage);
        }
        more = this->advance(fetch, tiles, moved);
        if (moved && fetches_w) w_next = this->w_reader(fetch.at);
        if (moved && !fetches_w) raw_next = raw_reader(fetch.at);
      }
      copy_async_commit();
    };
    const int ahead = fetches_w ? Tile::WStages - 1 : RawAhead, stages = fetches_w ? Tile::WStages : Tile::RawStages;
    for (int stage = 0; stage < ahead; ++stage) fetch_next(stage);
    Accumulators acc;
    int fetch_stage = ahead % stages, raw_stage = 0, x_stage = 0, w_stage = 0;
    if constexpr (!Tile::Direct) {
      // Step 0 of x: RawStages groups are under way, of which the first is awaited.
      if (!fetches_w) copy_async_wait<Tile::RawStages - 1>();
      __syncthreads();
      convert(0, 0);
      raw_stage = 1;
    }
    while (true) {
      const int w_part = current.s % Tile::WSteps;
      if (!fetches_w) copy_async_wait<Tile::RawStages - 2>();
      else if (w_part == 0) copy_async_wait<Tile::WStages - 2>();
      fence_shared_for_wgmma();
      // Everybody's pieces of this step have landed, and everybody's products of the step before are done.
      __syncthreads();
      multiply(acc, x_stage, w_stage, w_part, current.s == 0);
      if (!fetches_w || w_part == 0) {
        fetch_next(fetch_stage);
        fetch_stage = fetch_stage + 1 == stages ? 0 : fetch_stage + 1;
      }
      if constexpr (!Tile::Direct) {
        // Past the last step this converts what is no longer used.
        convert(raw_stage, x_stage ^ 1);
        raw_stage = raw_stage + 1 == Tile::RawStages ? 0 : raw_stage + 1;
      }
      wgmma_wait();
      if (current.s + 1 == steps) finish(acc, current.at);
      if (!this->advance(current, tiles, moved)) return;
      if constexpr (Tile::Direct) x_stage = x_stage + 1 == Tile::RawStages ? 0 : x_stage + 1;
      else x_stage ^= 1;
      // After an advance, s is 0 at the first step of a tile, which starts a stage of w as well.
      if (current.s % Tile::WSteps == 0) w_stage = w_stage + 1 == Tile::WStages ? 0 : w_stage + 1;
    }
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1) batch_first_hopper_kernel(const __grid_constant__ Product p, unsigned tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchFirstHopper<Tile>(p, shared_address(dynamic_shared)).run(tiles);
#endif
}

}  // namespace structlayers
