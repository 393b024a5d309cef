#include "launch.cuh"

namespace structlayers {

cudaError_t launch_float32_split(const Product& p, bool batch_last, int tile, cudaStream_t stream) {
  return launch_32bit<true>(p, batch_last, tile, stream);
}

}  // namespace structlayers
