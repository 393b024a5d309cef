#include "launch_pair_registers.cuh"

namespace structlayers {

cudaError_t launch_pair_registers_bfloat16(const Pair& p, cudaStream_t stream) {
  return launch_pair_registers<__nv_bfloat16>(p, stream);
}

}  // namespace structlayers
