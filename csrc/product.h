// One product with one factor, as the kernels are told of it. No torch here.
#pragma once

#include <cstdint>

namespace structlayers {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// y[n, (i*b + j)*d + l] = activation(sum_k w[i, l, j, k] * x[n, (i*c + k)*d + l] + bias[(i*b + j)*d + l])
struct Product {
  const void* x;
  const void* w;     // (a, d, b, c), contiguous
  const void* bias;  // out_features, or null
  void* y;
  int64_t n;
  int64_t x_stride;  // elements between rows (batch-first) or between features (batch-last)
  int64_t y_stride;
  int64_t in_features;  // logical: columns from here on count as zeros and are not read
  int64_t out_features;  // logical: rows from here on are not written
  int a, b, c, d;
  int activation;
  // Whether every 16-byte piece that the vector paths touch is aligned.
  bool x_aligned, w_aligned, y_aligned;
};

}  // namespace structlayers
