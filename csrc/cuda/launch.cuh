// Launches that overlap: a kernel that waits itself (griddepcontrol.wait) for what the kernel before it in the stream wrote
// may be made ready while that one runs.
#pragma once

#include "nf4.cuh"

namespace qsharded {

struct Device {
  int number = -1, major, minor, processors, shared_bytes;

  static Device of(int number) {
    Device found;
    found.number = number;
    cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, number);
    cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, number);
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, number);
    cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
    return found;
  }

  // Asked for in every call, so the last one is kept.
  static const Device& current() {
    thread_local Device last;
    int number;
    cudaGetDevice(&number);
    if (number != last.number) last = of(number);
    return last;
  }
};

__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                               cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = Device::current().major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace qsharded
