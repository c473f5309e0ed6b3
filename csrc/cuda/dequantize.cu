// NF4 dequantize: out = levels[code] * absmax in fp32, rounded once; absmax of 8 bits is decoded in the same pass.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4.cuh"

namespace qsharded {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Vectors of a lane: enough in flight to hide memory's latency; more would lengthen the code, which a first launch
// fetches from memory too.
constexpr int kRounds = 4;

// A thread writes 16 bytes at a time, so that a warp's stores are whole lines, and reads the codes that make them.
template <typename CodesType, typename PairType>
struct VectorOf {
  using Codes = CodesType;
  using Pair = PairType;  // of weights
  static constexpr int kPairs = sizeof(Codes);
  static constexpr int kLanes = kBlock / (2 * kPairs);  // that share a block
  static constexpr int kWarpBlocks = kRounds * kWarp / kLanes;
};
template <typename Out>
struct Vector;
template <>
struct Vector<__nv_bfloat16> : VectorOf<uint32_t, __nv_bfloat162> {};
template <>
struct Vector<__half> : VectorOf<uint32_t, __half2> {};
template <>
struct Vector<float> : VectorOf<uint16_t, float2> {};

// Quotients of numbers below 2^31 by multiplication: the hardware has no integer division.
class Divider {
 public:
  explicit Divider(unsigned divisor) {
    while (divisor > 1ull << (shift_ - 31)) ++shift_;
    magic_ = static_cast<unsigned>(((1ull << shift_) + divisor - 1) / divisor);
  }
  __device__ unsigned quotient(unsigned number) const {
    return static_cast<unsigned>(static_cast<uint64_t>(number) * magic_ >> shift_);
  }

 private:
  int shift_ = 31;  // 31 + ceil(log2(divisor)): the quotient's error stays below 1 / divisor
  unsigned magic_;
};

struct Absmax {
  const void* values;  // fp32 where scales is null, else 8-bit codes
  int64_t row_gap;     // entries between a row's end and the next row
  Divider blocks_per_row;
  const float* scales;
  const float* offset;
  const float* map;

  template <bool kDoubleQuant>
  __device__ float at(unsigned block) const {
    const int64_t index = block + blocks_per_row.quotient(block) * row_gap;
    if constexpr (!kDoubleQuant) return static_cast<const float*>(values)[index];
    const float entry = __ldg(map + static_cast<const uint8_t*>(values)[index]);
    const float scale = __ldg(scales + block / kAbsmaxBlock);
    return decode_absmax(entry, scale, __ldg(offset));
  }
};

__device__ inline void store_pair(__nv_bfloat162* out, float first, float second) {
  *out = __floats2bfloat162_rn(first, second);
}
__device__ inline void store_pair(__half2* out, float first, float second) { *out = __floats2half2_rn(first, second); }
__device__ inline void store_pair(float2* out, float first, float second) { *out = make_float2(first, second); }

// 16 bytes of weights. levels lies in shared memory: its 16 entries are in 16 banks, so no look-up waits for another.
template <typename Out>
__device__ uint4 decode(uint32_t codes, float absmax, const float* levels) {
  // every nibble times four: a byte's offset into levels
  const uint32_t first = codes >> 2 & 0x3C3C3C3Cu;
  const uint32_t second = codes << 2 & 0x3C3C3C3Cu;
  const auto level = [levels](uint32_t offsets, int byte) {
    const char* base = reinterpret_cast<const char*>(levels);
    return *reinterpret_cast<const float*>(base + __byte_perm(offsets, 0, 0x4440 + byte));
  };
  uint4 out;
  auto* pairs = reinterpret_cast<typename Vector<Out>::Pair*>(&out);
#pragma unroll
  for (int i = 0; i < Vector<Out>::kPairs; ++i) {
    store_pair(pairs + i, __fmul_rn(level(first, i), absmax), __fmul_rn(level(second, i), absmax));
  }
  return out;
}

// A warp decodes a run of blocks, each lane the absmax of one, and needs no other warp: no barrier, and while one waits
// for memory the others write.
template <typename Out, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const typename Vector<Out>::Codes* codes, unsigned blocks, Absmax absmax, const float* levels,
                      uint4* out) {
  constexpr int kLanes = Vector<Out>::kLanes;
  __shared__ float own_levels[kWarps][16];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned first_block = (blockIdx.x * kWarps + warp) * Vector<Out>::kWarpBlocks;
  const int64_t first_vector = static_cast<int64_t>(first_block) * kLanes + lane;
  // how far this lane's vectors reach, in strides of a warp; beyond the last block not at all
  const int64_t left = static_cast<int64_t>(blocks) * kLanes - first_vector;
  const int inside = static_cast<int>(min(max(left, int64_t{0}), int64_t{kRounds * kWarp}));
  codes += first_vector;
  out += first_vector;

  typename Vector<Out>::Codes loaded[kRounds];  // all in flight before the first is used
#pragma unroll
  for (int i = 0; i < kRounds; ++i) loaded[i] = i * kWarp < inside ? __ldcs(codes + i * kWarp) : 0;
  if (lane < 16) own_levels[warp][lane] = __ldg(levels + lane);
  const unsigned block = first_block + lane % Vector<Out>::kWarpBlocks;
  const float own_absmax = block < blocks ? absmax.template at<kDoubleQuant>(block) : 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const float its_absmax = __shfl_sync(~0u, own_absmax, (i * kWarp + lane) / kLanes);
    const uint4 weights = decode<Out>(loaded[i], its_absmax, own_levels[warp]);
    if (i * kWarp < inside) __stcs(out + i * kWarp, weights);
  }
}

template <typename Out>
int dequantize(const uint8_t* codes, unsigned blocks, const Absmax& absmax, const float* levels, void* out,
               cudaStream_t stream) {
  const auto kernel = absmax.scales ? dequantize_kernel<Out, true> : dequantize_kernel<Out, false>;
  kernel<<<ceil_div(blocks, kWarps * Vector<Out>::kWarpBlocks), kThreads, 0, stream>>>(
      reinterpret_cast<const typename Vector<Out>::Codes*>(codes), blocks, absmax, levels, static_cast<uint4*>(out));
  return launch_result();
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row, const void* absmax,
                                 int64_t absmax_row_stride, const float* absmax_scales, const float* absmax_offset,
                                 const float* absmax_map, const float* levels, void* out, int dtype, void* stream) {
  const int64_t blocks = rows * blocks_per_row;
  if (blocks == 0) return QSHARDED_OK;
  if (blocks > kMostBlocks) return QSHARDED_BAD_SIZE;
  const Absmax source = {absmax,        absmax_row_stride - blocks_per_row, Divider(blocks_per_row),
                         absmax_scales, absmax_offset,                      absmax_map};
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  if (dtype == QSHARDED_BFLOAT16) return dequantize<__nv_bfloat16>(codes, count, source, levels, out, on);
  if (dtype == QSHARDED_FLOAT16) return dequantize<__half>(codes, count, source, levels, out, on);
  if (dtype == QSHARDED_FLOAT32) return dequantize<float>(codes, count, source, levels, out, on);
  return QSHARDED_BAD_DTYPE;
}
