// NF4 quantize: a block's absmax, and how many midpoints lie below weight * (1 / max(absmax, 1e-38)) in fp32.
//
//   bf16:  | lane 0: 8 weights | lane 1 | .. | lane 7 |   8 lanes share a block of 64 (fp32: 16 lanes of 4 weights)
//              |                                          max over the lanes by shuffles -> absmax
//              +-> Bins, in shared memory -> 8 codes = 4 bytes a lane
//
// A thread has kVectors vectors of 16 bytes, kThreads vectors apart.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "nf4.cuh"

namespace qsharded {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // 16-byte loads of a thread, all in flight before the first is used
constexpr int kMidpoints = 15;

// ---- Codes of scaled weights ----

// [-1, 1] in 32 bins narrower than any two midpoints are apart: a bin has one midpoint at most, so one comparison ends
// the search. Each table has one entry a bank, so no look-up waits for another.
struct Bins {
  float midpoint[32];   // infinity where the bin has none
  unsigned below[32];   // midpoints in the bins below
};

// Four times the bin: 0, 4, .. 124, never falling as `scaled` grows. NaN has a bin too.
__device__ inline unsigned bin_offset(float scaled) {
  constexpr float kAdjust = 0x1p23f + 62;  // beside 2^23 a float's last bit is 1
  return __float_as_uint(fmaf(scaled, 62.0f, kAdjust)) & 124u;
}

// By one warp.
__device__ void fill(Bins* bins, const float* midpoints) {
  const unsigned lane = threadIdx.x;
  const float own = lane < kMidpoints ? __ldg(midpoints + lane) : 0;
  float midpoint = INFINITY;
  unsigned below = 0;
#pragma unroll
  for (int i = 0; i < kMidpoints; ++i) {
    const float other = __shfl_sync(~0u, own, i);
    const unsigned bin = bin_offset(other) / 4;
    if (bin == lane) midpoint = other;
    below += bin < lane;
  }
  bins->midpoint[lane] = midpoint;
  bins->below[lane] = below;
}

__device__ inline unsigned code_of(float scaled, const Bins* bins) {
  const unsigned offset = bin_offset(scaled);
  const auto entry = [offset](const void* table) { return static_cast<const char*>(table) + offset; };
  const float midpoint = *reinterpret_cast<const float*>(entry(bins->midpoint));
  const unsigned below = *reinterpret_cast<const unsigned*>(entry(bins->below));
  // the sign of a difference is exact
  return below + (__float_as_uint(__fsub_rn(midpoint, scaled)) >> 31);
}

// ---- Magnitudes of weights ----

// 16 bytes of weights: their fp32 values in pairs, and their largest magnitude in a form that `merge` reduces and
// `value` reads. NaN is the largest of all.
template <typename In>
struct Weights;

template <>
struct Weights<float> {
  static constexpr int kCount = 4;
  // without their sign bits floats order as integers do
  static __device__ unsigned magnitude(const uint4& v) {
    constexpr unsigned kNoSign = 0x7FFFFFFFu;
    return max(max(v.x & kNoSign, v.y & kNoSign), max(v.z & kNoSign, v.w & kNoSign));
  }
  static __device__ unsigned merge(unsigned a, unsigned b) { return max(a, b); }
  static __device__ float value(unsigned m) { return __uint_as_float(m); }
  static __device__ float2 pair(const uint4& v, int i) {
    return i == 0 ? make_float2(__uint_as_float(v.x), __uint_as_float(v.y))
                  : make_float2(__uint_as_float(v.z), __uint_as_float(v.w));
  }
};

__device__ inline unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <typename Pair>
__device__ inline Pair as_pair(unsigned bits) {
  return *reinterpret_cast<Pair*>(&bits);
}

// Two weights a word; the maxima of both halves are carried side by side.
template <typename Pair>
struct HalfWeights {
  static constexpr int kCount = 8;
  static __device__ unsigned merge(unsigned a, unsigned b) {
    Pair larger = __hmax2_nan(as_pair<Pair>(a), as_pair<Pair>(b));
    return *reinterpret_cast<unsigned*>(&larger);
  }
  static __device__ unsigned magnitude(const uint4& v) {
    constexpr unsigned kNoSigns = 0x7FFF7FFFu;
    return merge(merge(v.x & kNoSigns, v.y & kNoSigns), merge(v.z & kNoSigns, v.w & kNoSigns));
  }
};

template <>
struct Weights<__nv_bfloat16> : HalfWeights<__nv_bfloat162> {
  static __device__ float2 pair(const uint4& v, int i) {
    return make_float2(__uint_as_float(word(v, i) << 16), __uint_as_float(word(v, i) & 0xFFFF0000u));
  }
  static __device__ float value(unsigned m) { return __uint_as_float(max(m << 16, m & 0xFFFF0000u)); }
};

template <>
struct Weights<__half> : HalfWeights<__half2> {
  static __device__ float2 pair(const uint4& v, int i) { return __half22float2(as_pair<__half2>(word(v, i))); }
  static __device__ float value(unsigned m) {
    const unsigned larger = max(m & 0xFFFFu, m >> 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(larger)));
  }
};

template <typename In>
__device__ unsigned over_block(unsigned magnitude) {
#pragma unroll
  for (int step = kBlock / Weights<In>::kCount / 2; step > 0; step /= 2) {
    magnitude = Weights<In>::merge(magnitude, __shfl_xor_sync(~0u, magnitude, step));
  }
  return magnitude;
}

// Two codes a byte, the first in the high nibble.
template <typename In>
__device__ unsigned encode(const uint4& weights, float scale, const Bins* bins) {
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < Weights<In>::kCount / 2; ++i) {
    const float2 pair = Weights<In>::pair(weights, i);
    codes += code_of(__fmul_rn(pair.x, scale), bins) << (8 * i + 4);
    codes += code_of(__fmul_rn(pair.y, scale), bins) << (8 * i);
  }
  return codes;
}

// ---- Kernel ----

template <typename In>
using CodesOf = std::conditional_t<Weights<In>::kCount == 8, uint32_t, uint16_t>;

template <typename In>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const uint4* weight, unsigned blocks, const float* midpoints, CodesOf<In>* codes, float* absmax) {
  using W = Weights<In>;
  constexpr int kLanes = kBlock / W::kCount;  // that share a block
  __shared__ Bins bins;
  const int64_t first_vector = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  // how far this thread's vectors reach, in strides of kThreads
  const int64_t left = static_cast<int64_t>(blocks) * kLanes - first_vector;
  const int inside = static_cast<int>(min(max(left, int64_t{0}), int64_t{kVectors * kThreads}));
  weight += first_vector;
  codes += first_vector;
  absmax += first_vector / kLanes;

  uint4 loaded[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) loaded[i] = i * kThreads < inside ? __ldcs(weight + i * kThreads) : uint4{};
  if (threadIdx.x < kWarp) fill(&bins, midpoints);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float own_absmax = W::value(over_block<In>(W::magnitude(loaded[i])));
    const auto packed = static_cast<CodesOf<In>>(encode<In>(loaded[i], reciprocal(own_absmax), &bins));
    const bool stores = i * kThreads < inside;  // no early exit: the whole warp shuffles
    if (stores) codes[i * kThreads] = packed;
    if (stores && threadIdx.x % kLanes == 0) absmax[i * (kThreads / kLanes)] = own_absmax;
  }
}

template <typename In>
int quantize(const void* weight, unsigned blocks, const float* midpoints, uint8_t* codes, float* absmax,
             cudaStream_t stream) {
  constexpr int kBlocks = kThreads * kVectors * Weights<In>::kCount / kBlock;
  quantize_kernel<In><<<ceil_div(blocks, kBlocks), kThreads, 0, stream>>>(
      static_cast<const uint4*>(weight), blocks, midpoints, reinterpret_cast<CodesOf<In>*>(codes), absmax);
  return launch_result();
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints, uint8_t* codes,
                               float* absmax, void* stream) {
  if (blocks == 0) return QSHARDED_OK;
  if (blocks > kMostBlocks) return QSHARDED_BAD_SIZE;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  if (dtype == QSHARDED_BFLOAT16) return quantize<__nv_bfloat16>(weight, count, midpoints, codes, absmax, on);
  if (dtype == QSHARDED_FLOAT16) return quantize<__half>(weight, count, midpoints, codes, absmax, on);
  if (dtype == QSHARDED_FLOAT32) return quantize<float>(weight, count, midpoints, codes, absmax, on);
  return QSHARDED_BAD_DTYPE;
}
