// How y of batch_last_registers.cuh leaves: bias, activation, and every warp's 16 rows in parts of 128 n.
#pragma once

#include "batch_last_tile.cuh"

namespace structlayers {

// Base: LastFrame, or what adds to it. A row of a part of y begins as far behind a sector of shared memory as it does in memory; what
// then reaches beyond the part's last sector is carried to the next part. Where tiles overlap, a tile writes the sectors that begin
// in its own TN columns.
template <typename Base>
struct LastOutput : Base {
  using Base::Base, Base::p, Base::lane, Base::group, Base::warp, Base::my_j, Base::my_n, Base::y_base;
  using typename Base::Tile, typename Base::T, typename Base::Place;
  static constexpr int Parts = Tile::WN / 128, PartN = 128, PartBytes = PartN * 2, SectorBytes = Tile::SectorN * 2;
  static_assert(Tile::YPitch >= PartBytes + (Tile::Strided ? SectorBytes : 0));

  // Products of 128 n, [8 n][4].
  using Accumulators = float[Parts][16][4];

  // This warp's 16 rows of y: where the first element of each lies that the warp computes, and how many there are.
  struct Rows {
    uintptr_t first;
    int64_t stride, n;  // bytes; elements of a row from there on
    int count;
    __device__ __forceinline__ uintptr_t at(int row) const { return first + row * stride; }
    // How many bytes of the sector in which a row begins lie before it.
    __device__ __forceinline__ int before(int row) const { return Tile::Strided ? static_cast<int>(at(row) % SectorBytes) : 0; }
  };

  // Of this warp's row 0.
  __device__ __forceinline__ int64_t first_feature(const Place& at) const {
    return (static_cast<int64_t>(at.i) * p.b + at.j0 + my_j + warp * 16) * p.d + at.l0;
  }

  __device__ __forceinline__ Rows rows_of(const Place& at) const {
    const int64_t feature = first_feature(at), n = at.n0 + my_n, left = p.out_features - feature;
    const int there = left > 15 * static_cast<int64_t>(p.d) ? 16 : left > 0 ? static_cast<int>((left - 1) / p.d) + 1 : 0;
    return {reinterpret_cast<uintptr_t>(p.y) + (feature * p.y_stride + n) * 2, p.d * p.y_stride * 2, p.n - n,
            min(p.b - at.j0 - my_j - warp * 16, there)};
  }

  // Where this warp has its rows of a part.
  const uint32_t area = y_base + (group * 4 + warp) * (16 * Tile::YPitch);

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
    // Nothing that follows from it is kept in registers while products are under way.
    int thread = lane;
    asm volatile("" : "+r"(thread));
    const Rows rows = rows_of(at);
    // Of this thread's rows, where the first two values go, and the bias.
    uint32_t places[2];
    float bias[2] = {0.f, 0.f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = thread / 4 + 8 * h;
      places[h] = area + row * Tile::YPitch + rows.before(row) + thread % 4 * 4;
      if (p.bias != nullptr && row < rows.count) {
        bias[h] = to_float(static_cast<const T*>(p.bias)[first_feature(at) + static_cast<int64_t>(row) * p.d]);
      }
    }
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      // What was here has left.
      if constexpr (Tile::Bulk) store_box_wait_read();
      __syncwarp();
      if constexpr (Tile::Strided) {
        if (part > 0) carry(thread);
      }
      stage(acc[part], places, bias);
      if (p.activation != kNone) activate(thread);
      if constexpr (Tile::Bulk) fence_shared_for_wgmma();
      __syncwarp();
      write_part(rows, part, at.n0 + my_n == 0, thread);
    }
  }

  // No thread leaves before what it wrote has been read.
  __device__ __forceinline__ void end_output() const {
    if constexpr (Tile::Bulk) store_box_wait_read();
  }

  __device__ __forceinline__ void carry(int thread) const {
    const uint32_t place = area + thread / 2 * Tile::YPitch + thread % 2 * 16;
    uint32_t v[4];
    load_shared_16(v, place + PartBytes);
    store_shared_16(place, v);
    __syncwarp();
  }

  __device__ __forceinline__ void stage(const float (&acc)[16][4], const uint32_t (&places)[2], const float (&bias)[2]) const {
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t both = pack_two<T>(acc[g][2 * h] + bias[h], acc[g][2 * h + 1] + bias[h]), place = places[h] + g * 16;
        if constexpr (Tile::Strided) {
          store_shared_element<2>(place, both);
          store_shared_element<2>(place + 2, both >> 16);
        } else {
          store_shared_4(place, both);
        }
      }
    }
  }

  // What is carried on, the next part has again.
  __device__ __forceinline__ void activate(int thread) const {
    constexpr int Pieces = PartBytes / 16;
    __syncwarp();
#pragma unroll 1
    for (int piece = thread; piece < 16 * Pieces; piece += 32) {
      const uint32_t place = area + piece / Pieces * Tile::YPitch + piece % Pieces * 16;
      uint32_t v[4];
      load_shared_16(v, place);
      activate_piece<T>(v, p.activation);
      store_shared_16(place, v);
    }
  }

  // The bytes of a part of a row that this tile writes, from the sector on in which the part begins: whole pieces (sectors, but for
  // the end of the batch) from `begin` to `whole`, then what is left of it.
  struct Span {
    uintptr_t base;
    int before, begin, whole, end;
  };

  __device__ __forceinline__ Span span_of(const Rows& rows, int part, int row) const {
    Span span;
    span.before = rows.before(row);
    span.base = rows.at(row) - span.before + part * PartBytes;
    const int first = span.before > 0 ? SectorBytes : 0, own = Tile::Strided ? first + Tile::TN * 2 : Tile::WN * 2;
    const int values = span.before + static_cast<int>(min(rows.n, int64_t{Tile::WN})) * 2;
    span.begin = max(first - part * PartBytes, 0);
    span.end = min(min(own, values) - part * PartBytes, PartBytes);
    span.whole = span.end & ~15;
    return span;
  }

  __device__ __forceinline__ void write_part(const Rows& rows, int part, bool first, int thread) const {
    if constexpr (Tile::Bulk) {
      if (thread < rows.count) {
        const Span span = span_of(rows, part, thread);
        if (span.whole > span.begin) store_bytes(span.base + span.begin, area + thread * Tile::YPitch + span.begin, span.whole - span.begin);
      }
      store_box_commit();
    } else {
      const int place = thread % 16 * 16;
#pragma unroll
      for (int row = thread / 16; row < 16; row += 2) {
        const Span span = span_of(rows, part, row);
        if (row >= rows.count || place < span.begin || place >= span.whole) continue;
        uint32_t v[4];
        load_shared_16(v, area + row * Tile::YPitch + place);
        store_global_16(reinterpret_cast<void*>(span.base + place), v);
      }
    }
    // The ends of rows.
    if (thread >= rows.count || (!(first && part == 0) && rows.n >= Tile::WN)) return;
    const Span span = span_of(rows, part, thread);
    const uint32_t staged = area + thread * Tile::YPitch;
    if (first && part == 0) {
#pragma unroll 1
      for (int piece = 0; piece < span.begin; piece += 16) write_elements(span.base, staged, piece, span.before, min(span.end, span.begin));
    }
    if (span.whole >= span.begin && span.end > span.whole) write_elements(span.base, staged, span.whole, span.whole, span.end);
  }

  // Bytes from.. to - 1 of the piece at `piece`.
  static __device__ __forceinline__ void write_elements(uintptr_t base, uint32_t staged, int piece, int from, int to) {
    uint32_t v[4];
    load_shared_16(v, staged + piece);
    store_elements<2>(reinterpret_cast<void*>(base + piece), v, (from - piece) / 2, (to - piece) / 2);
  }
};

}  // namespace structlayers
