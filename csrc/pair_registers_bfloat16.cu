#include "launch_pair_registers.cuh"

namespace structlayers {

cudaError_t launch_pair_registers_bfloat16(const Pair& p, int parts, cudaStream_t stream) {
  return launch_pair_registers<__nv_bfloat16>(p, parts, stream);
}

}  // namespace structlayers
