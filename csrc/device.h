// What the host asks of the current device. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

namespace structlayers {

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline int multiprocessors() {
  static int counts[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& count = counts[device % 64];
  if (count == 0) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// wgmma is in the binary where it was built for sm_90a (setup.py defines STRUCTLAYERS_SM90A), and runs on 9.0 alone.
inline bool has_wgmma() {
#ifdef STRUCTLAYERS_SM90A
  static int majors[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& major = majors[device % 64];
  if (major == 0) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
#else
  return false;
#endif
}

// More than 48 KB of dynamic shared memory must be asked for once per kernel and device.
template <auto Kernel>
cudaError_t allow_shared_bytes(int bytes) {
  static std::mutex mutex;
  static uint64_t ready = 0;
  int device = 0;
  cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  std::lock_guard<std::mutex> lock(mutex);
  if (ready & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) ready |= bit;
  else cudaGetLastError();
  return error;
}

}  // namespace structlayers
