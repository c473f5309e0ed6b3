// The device, and programmatic dependent launch (PDL): a kernel that itself waits (pdl_wait) for what the kernel before
// it in the stream wrote may be launched while that one still runs.
#pragma once

#include "nf4.cuh"

namespace qsharded {

struct Device {
  int number = -1, major, minor, sms, shared_bytes;

  static Device of(int number) {
    Device found;
    found.number = number;
    cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, number);
    cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, number);
    cudaDeviceGetAttribute(&found.sms, cudaDevAttrMultiProcessorCount, number);
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

// From here on the next kernel of the stream may be launched, if it is launched by launch_pdl.
__device__ inline void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the kernel before this one has ended and its writes are seen.
__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_pdl(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                       const Arguments&... arguments) {
  cudaLaunchAttribute pdl = {};
  pdl.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  pdl.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &pdl;
  config.numAttrs = Device::current().major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace qsharded
