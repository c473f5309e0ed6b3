// The fused product's plain C interface: which kernel serves which sizes, and the workspace they share.
#include "linear_mma.cuh"
#include "linear_wgmma.cuh"

namespace qsharded {
namespace {

constexpr int64_t kMostColumns = 1 << 20;  // offsets within a tile are 32-bit
constexpr int64_t kMostM = 1 << 15;
constexpr int kWgmmaRegisters = 64;        // more than the empty kernel takes that other targets are built with

// A kernel and what its workspace depends on.
template <typename T>
struct Kernel {
  int tile_rows, tile_columns, tile_m;
  int64_t chunk_bytes;  // of rearranged x, for each chunk of columns
  cudaError_t (*launch)(const LinearArguments<T>&, uint8_t* arranged_x, cudaStream_t);
};

template <typename T, typename Shape>
Kernel<T> mma_kernel() {
  const auto launch = [](const LinearArguments<T>& a, uint8_t*, cudaStream_t stream) {
    return launch_mma<Shape>(a, stream);
  };
  return {Shape::kRows, Shape::kColumns, Shape::kM, 0, launch};
}

template <typename T, typename Shape>
Kernel<T> wgmma_kernel() {
  const auto launch = [](const LinearArguments<T>& a, uint8_t* arranged_x, cudaStream_t stream) {
    return launch_wgmma<Shape>(a, arranged_x, stream);
  };
  return {Shape::kRows, Shape::kColumns, Shape::kM, Shape::kStageBytes, launch};
}

struct Device {
  int processors, shared_bytes;
  bool wgmma;

  static Device current() {
    int device, major, minor;
    Device found;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaFuncAttributes attributes;
    const auto kernel = linear_wgmma_kernel<WgmmaShape<2, 1, 256, 2>, __nv_bfloat16, true>;
    found.wgmma = major == 9 && minor == 0 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
                  attributes.numRegs > kWgmmaRegisters;
    return found;
  }
};

// From benchmarks on an H200; a device with little shared memory (sm_86, sm_89) takes the small shapes.
template <typename T>
Kernel<T> choose(int64_t m, const Device& device) {
  if (m > 16 && device.wgmma) {
    if (m <= 32) return wgmma_kernel<T, WgmmaShape<4, 1, 32, 4>>();
    if (m <= 64) return wgmma_kernel<T, WgmmaShape<4, 1, 64, 4>>();
    if (m <= 128) return wgmma_kernel<T, WgmmaShape<4, 1, 128, 3>>();
    return wgmma_kernel<T, WgmmaShape<2, 1, 256, 2>>();
  }
  using One = MmaShape<4, 2, 4, 1>;
  using Two = MmaShape<8, 2, 2, 2>;
  const bool small = device.shared_bytes < Two::kSharedBytes;
  if (m <= 8) return small ? mma_kernel<T, MmaShape<4, 1, 4, 1>>() : mma_kernel<T, One>();
  return small ? mma_kernel<T, MmaShape<4, 1, 4, 2>>() : mma_kernel<T, Two>();
}

struct Layout {
  int row_tiles, chunks, m_tiles;
  Partition partition;
  int64_t partial_bytes, arranged_bytes;
};

template <typename T>
Layout lay_out(const Kernel<T>& kernel, int64_t m, int64_t rows, int64_t blocks_per_row, const Device& device) {
  Layout layout;
  layout.row_tiles = ceil_div(rows, kernel.tile_rows);
  layout.chunks = ceil_div(blocks_per_row * kBlock, kernel.tile_columns);
  layout.m_tiles = ceil_div(m, kernel.tile_m);
  layout.partition = Partition::of(layout.row_tiles, layout.chunks, device.processors);
  const int64_t slot_bytes = static_cast<int64_t>(kernel.tile_rows) * kernel.tile_m * sizeof(float);
  layout.partial_bytes = layout.m_tiles * layout.partition.slots() * slot_bytes;
  layout.arranged_bytes = layout.m_tiles * layout.chunks * kernel.chunk_bytes;
  return layout;
}

template <typename T>
int64_t workspace_bytes(int64_t m, int64_t rows, int64_t blocks_per_row) {
  const Device device = Device::current();
  const Layout layout = lay_out(choose<T>(m, device), m, rows, blocks_per_row, device);
  return layout.partial_bytes + layout.arranged_bytes;
}

template <typename T>
int run(const void* x, int64_t m, const PackedWeight& w, const void* bias, void* y, void* workspace, void* stream) {
  const Device device = Device::current();
  const Kernel<T> kernel = choose<T>(m, device);
  const Layout layout = lay_out(kernel, m, w.rows, w.blocks_per_row, device);
  LinearArguments<T> a = {w, static_cast<const T*>(x), 0, static_cast<T*>(y), static_cast<const T*>(bias),
                          static_cast<float*>(workspace), layout.partition};
  auto* const arranged_x = static_cast<uint8_t*>(workspace) + layout.partial_bytes;
  // wgmma kernels take one tile of m a launch, the others as many as a grid's second axis holds
  const int64_t step = kernel.chunk_bytes ? kernel.tile_m : kMostM;
  for (int64_t m0 = 0; m0 < m; m0 += step) {
    a.m = static_cast<int>(m - m0 < step ? m - m0 : step);
    a.x = static_cast<const T*>(x) + m0 * w.blocks_per_row * kBlock;
    a.y = static_cast<T*>(y) + m0 * w.rows;
    const cudaError_t error = kernel.launch(a, arranged_x, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return result_of(error);
  }
  return QSHARDED_OK;
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int64_t qsharded_cuda_nf4_linear_workspace(int dtype, int64_t m, int64_t rows, int64_t blocks_per_row) {
  if (m == 0 || rows == 0) return 0;
  return dtype == QSHARDED_FLOAT16 ? workspace_bytes<__half>(m, rows, blocks_per_row)
                                   : workspace_bytes<__nv_bfloat16>(m, rows, blocks_per_row);
}

int qsharded_cuda_nf4_linear_has_wgmma(void) { return Device::current().wgmma; }

int qsharded_cuda_nf4_linear(const void* x, int dtype, int64_t m, const uint8_t* codes, int64_t rows,
                             int64_t blocks_per_row, const void* absmax, int64_t absmax_row_stride,
                             const float* absmax_scales, const float* absmax_offset, const float* absmax_map,
                             const float* levels, const void* bias, void* y, void* workspace, void* stream) {
  if (m == 0 || rows == 0) return QSHARDED_OK;
  if (rows * blocks_per_row > kMostBlocks || blocks_per_row * kBlock > kMostColumns || m > INT32_MAX) {
    return QSHARDED_BAD_SIZE;
  }
  const PackedWeight w = {codes, absmax, absmax_row_stride, absmax_scales, absmax_offset, absmax_map, levels, rows,
                          static_cast<int>(blocks_per_row)};
  if (dtype == QSHARDED_BFLOAT16) return run<__nv_bfloat16>(x, m, w, bias, y, workspace, stream);
  if (dtype == QSHARDED_FLOAT16) return run<__half>(x, m, w, bias, y, workspace, stream);
  return QSHARDED_BAD_DTYPE;
}
