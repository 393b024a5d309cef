// The product where rows or blocks are no whole 16-byte pieces, as the other files call it. Each element type is compiled in a
// file of its own. No torch here.
#pragma once

#include <cuda_runtime.h>

#include "product.h"

namespace structlayers {

// Launches on `stream` on the current device, batch-first. Leaves `taken` false, and launches nothing, where the kernel does not
// take the product.
template <typename T, bool Split>
cudaError_t launch_unaligned(const Product& p, cudaStream_t stream, bool& taken);

}  // namespace structlayers
