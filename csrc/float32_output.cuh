// From the accumulators of float32_registers.cuh to y: bias, activation, and stores that fill sectors.
#pragma once

#include "float32_tile.cuh"
#include "tile.cuh"

namespace structlayers {

// Base: Float32Frame, or what adds to it.
template <typename Base>
struct Float32Output : Base {
  using Base::Base, Base::p, Base::y_base, Base::lane, Base::group, Base::warp, Base::my_j, Base::my_row, Base::row, Base::row_of, Base::DL, Base::LW,
      Base::WJ;
  using typename Base::Tile, typename Base::Place, typename Base::Accumulators;

  // Values of y that a thread writes at a time: LE values of l of two neighbours of 8 columns, of rows (row, row + 8).
  static constexpr int LE = DL, Groups = WJ / 8 / Tile::LGroups;
  using Finished = float[LE][4];

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
    if constexpr (Tile::Last) {
      write_y_last(acc, at);
    } else {
      // Nothing that follows from it is kept in registers while products are under way.
      int thread = lane;
      asm volatile("" : "+r"(thread));
      const int column0 = Tile::LGroups == 2 ? group * (WJ / 2) : my_j, columns = min(Groups * 8, p.b - at.j0 - column0);
      const int64_t d = step_j(), feature0 = (static_cast<int64_t>(at.i) * p.b + at.j0 + column0) * d + at.l0;
#pragma unroll
      for (int m = 0; m < Tile::RowTiles; ++m) {
        // Whole eighths of columns in all rows of this warp: one path for all of it.
        const int64_t n0 = at.n0 + my_row + m * 64;
        if (p.y_aligned && n0 + 16 <= p.n && columns % 8 == 0 && feature0 + (columns - 1) * d + LE <= p.out_features) {
          write_tile<true>(acc, m, thread, n0, feature0, columns);
        } else {
          write_tile<false>(acc, m, thread, n0, feature0, columns);
        }
      }
    }
  }

  // How many features there are from a value of j to the next.
  __device__ __forceinline__ int64_t step_j() const { return Tile::Strided ? p.d : DL; }

  template <bool Whole>
  __device__ __forceinline__ void write_tile(const Accumulators& acc, int m, int thread, int64_t n0, int64_t feature0, int columns) const {
    const int64_t d = step_j(), n = n0 + row_of(thread / 4), first = feature0 + thread % 4 * 2 * d;
    float* line = static_cast<float*>(p.y) + n * p.y_stride + first;
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      Finished z;
      if constexpr (Tile::LGroups == 2) {
        exchange(z, acc, g);
      } else {
#pragma unroll
        for (int l = 0; l < LE; ++l)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[l][e] = acc[DL == 1 ? m : l][g][e];
      }
      if (Whole && g * 8 >= columns) continue;
      const int column = g * 8 + thread % 4 * 2;
      const int64_t feature = first + g * 8 * d;
      if (p.bias != nullptr) {
        const float* bias = static_cast<const float*>(p.bias) + feature;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int l = 0; l < LE; ++l) {
            const bool inside = Whole || (column + e < columns && feature + e * d + l < p.out_features);
            const float v = inside ? __ldg(bias + e * d + l) : 0.f;
            z[l][e] += v;
            z[l][2 + e] += v;
          }
      }
      if (p.activation != kNone) {
#pragma unroll
        for (int l = 0; l < LE; ++l)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[l][e] = activate(z[l][e], p.activation);
      }
      float* destination = line + g * 8 * d;
      if constexpr (Whole) {
        write_columns(z, destination, 0, thread % 2 != 0);
        write_columns(z, destination + 8 * p.y_stride, 1, thread % 2 != 0);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int l = 0; l < LE; ++l) {
              if (n + h * 8 < p.n && column + e < columns && feature + e * d + l < p.out_features) {
                destination[h * 8 * p.y_stride + e * d + l] = z[l][2 * h + e];
              }
            }
      }
    }
  }

  // A warpgroup gives its values of 8 columns of the other half of j, and gets the other l of 8 of its own half.
  __device__ __forceinline__ void exchange(Finished& z, const Accumulators& acc, int g) const {
    constexpr int Half = WJ / 16;
    const int thread = threadIdx.x % 128;
    const bool upper = group == 1;
    const uint32_t mine = y_base + group * (128 * 16 * LW) + thread * 16, theirs = y_base + (group ^ 1) * (128 * 16 * LW) + thread * 16;
    sync_threads(1, Tile::Consumers);  // what was exchanged before has been read
#pragma unroll
    for (int l = 0; l < LW; ++l) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = __float_as_uint(upper ? acc[l][g][e] : acc[l][Half + g][e]);
      store_shared_16(mine + l * (128 * 16), v);
    }
    sync_threads(1, Tile::Consumers);
#pragma unroll
    for (int l = 0; l < LW; ++l) {
      uint32_t v[4];
      load_shared_16(v, theirs + l * (128 * 16));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float own = upper ? acc[l][Half + g][e] : acc[l][g][e], other = __uint_as_float(v[e]);
        z[l][e] = upper ? other : own;
        z[LW + l][e] = upper ? own : other;
      }
    }
  }

  // Batch-last: a thread has four neighbours in n of every j, and eight quads 128 bytes of a row of y.
  __device__ __forceinline__ void write_y_last(const Accumulators& acc, const Place& at) const {
    const int t = lane % 4;
    const int64_t n = at.n0 + (group * 4 + warp) * 32 + row * 4, valid = p.n - n;
    const int64_t feature0 = (static_cast<int64_t>(at.i) * p.b + at.j0) * p.d + at.l0;
#pragma unroll
    for (int g = 0; g < WJ / 8; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = g * 8 + 2 * t + e;
        const int64_t feature = feature0 + static_cast<int64_t>(j) * p.d;
        const bool inside = at.j0 + j < p.b && feature < p.out_features;
        const float bias = p.bias != nullptr && inside ? __ldg(static_cast<const float*>(p.bias) + feature) : 0.f;
        float z[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) z[q] = acc[q / 2][g][q % 2 * 2 + e] + bias;
        if (p.activation != kNone) {
#pragma unroll
          for (int q = 0; q < 4; ++q) z[q] = activate(z[q], p.activation);
        }
        float* destination = static_cast<float*>(p.y) + feature * p.y_stride + n;
        if (!p.y_aligned) {
          write_shifted(z, destination, inside ? valid : -4);
        } else if (inside && valid >= 4) {
          *reinterpret_cast<float4*>(destination) = make_float4(z[0], z[1], z[2], z[3]);
        } else if (inside) {
#pragma unroll
          for (int q = 0; q < 4; ++q)
            if (q < valid) destination[q] = z[q];
        }
      }
  }

  // Four neighbours of a row of y that is aligned to nothing, of which those before `valid` exist (-4: none of the row). A lane
  // writes the 16-byte piece of memory in which its first number lies, whose beginning it gets from the lane before.
  __device__ __forceinline__ void write_shifted(const float (&z)[4], float* destination, int64_t valid) const {
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(destination) / 4 % 4);
    const int before_row = (row + 7) % 8, before = (before_row % 4 * 2 + before_row / 4) * 4 + lane % 4;
    float line[7];
#pragma unroll
    for (int e = 0; e < 3; ++e) line[e] = __shfl_sync(0xffffffff, z[e + 1], before);
#pragma unroll
    for (int e = 0; e < 4; ++e) line[3 + e] = z[e];
    // Numbers 3 - shift .. of the line.
    float piece[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      piece[e] = line[3 + e];
#pragma unroll
      for (int by = 1; by < 4; ++by)
        if (shift == by) piece[e] = line[3 + e - by];
    }
    // The first lane of a row has nobody before it, and what the last one has left goes alone.
    const int least = row == 0 ? 0 : -shift;
    if (least == -shift && 3 - shift < valid) {
      *reinterpret_cast<float4*>(destination - shift) = make_float4(piece[0], piece[1], piece[2], piece[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e - shift >= least && e - shift < valid) destination[e - shift] = piece[e];
    }
    if (row == 7) {
#pragma unroll
      for (int e = 1; e < 4; ++e)
        if (e >= 4 - shift && e < valid) destination[e] = z[e];
    }
  }

  // Two neighbouring columns of one row. Where a thread's values of a column fill half a sector or more, two lanes exchange
  // pieces, so that every store of the warp fills whole sectors.
  __device__ __forceinline__ void write_columns(const Finished& z, float* line, int h, bool odd) const {
    const auto bits = [&](int l, int e) { return __float_as_uint(z[l][2 * h + e]); };
    if constexpr (DL == 1) {
      *reinterpret_cast<float2*>(line) = make_float2(z[0][2 * h], z[0][2 * h + 1]);
    } else if constexpr (DL == 2) {
      store_global_16(line, {bits(0, 0), bits(1, 0), bits(0, 1), bits(1, 1)});
    } else if constexpr (DL == 4) {
      const uint32_t low[4] = {bits(0, 0), bits(1, 0), bits(2, 0), bits(3, 0)}, high[4] = {bits(0, 1), bits(1, 1), bits(2, 1), bits(3, 1)};
      float* first = odd ? line - 4 : line;
      write_pair(low, high, first, first + 8, odd);
    } else {
      const int64_t d = step_j();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t low[4] = {bits(0, e), bits(1, e), bits(2, e), bits(3, e)}, high[4] = {bits(4, e), bits(5, e), bits(6, e), bits(7, e)};
        float* first = line + e * d + (odd ? 4 - 2 * d : 0);
        write_pair(low, high, first, first + 2 * d, odd);
      }
    }
  }

  // The even lane of two holds (A0, A1), the odd one (B0, B1): A0 and A1 leave together for `first`, B0 and B1 for `second`.
  static __device__ __forceinline__ void write_pair(const uint32_t (&low)[4], const uint32_t (&high)[4], float* first, float* second,
                                                    bool odd) {
    uint32_t a[4], b[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t received = __shfl_xor_sync(0xffffffff, odd ? low[e] : high[e], 1);
      a[e] = odd ? received : low[e];
      b[e] = odd ? high[e] : received;
    }
    store_global_16(first, a);
    store_global_16(second, b);
  }
};

}  // namespace structlayers
