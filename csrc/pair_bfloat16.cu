#include "launch_pair.cuh"

namespace structlayers {

cudaError_t launch_pair_bfloat16(const Pair& p, int tile, cudaStream_t stream) {
  return launch_pair<__nv_bfloat16>(p, tile, stream);
}

}  // namespace structlayers
