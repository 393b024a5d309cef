// The product of a small batch, as the other files call it. Each element type is compiled in a file of its own. No torch here.
#pragma once

#include <cuda_runtime.h>

#include "product.h"

namespace structlayers {

// Launches on `stream` on the current device; any batch, made for at most 64 rows. Returns an error of the launch.
template <typename T, bool Split>
cudaError_t launch_small_batch(const Product& p, bool batch_last, cudaStream_t stream);

}  // namespace structlayers
