#include "launch_pair.cuh"

namespace structlayers {

cudaError_t launch_pair_float16(const Pair& p, int tile, cudaStream_t stream) {
  return launch_pair<__half>(p, tile, stream);
}

}  // namespace structlayers
