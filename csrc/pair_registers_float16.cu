#include "launch_pair_registers.cuh"

namespace structlayers {

cudaError_t launch_pair_registers_float16(const Pair& p, int cluster, cudaStream_t stream) {
  return launch_pair_registers<__half>(p, cluster, stream);
}

}  // namespace structlayers
