// AdamW on moments kept in 8 bits: the parameters of one type behind consecutive blocks of state, in one launch.
// The arithmetic is that of qsharded.optim.reference, rounded after each operation.
#include <cuda_bf16.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "nf4.cuh"

namespace qsharded {
namespace {

constexpr int kThreads = 256;
constexpr int kStateBlock = 256;                         // values of a moment that share a scale
constexpr int kVector = 4;                               // consecutive values of a lane
constexpr int kVectors = kStateBlock / kWarp / kVector;  // a warp has one block
constexpr int kBlocksPerProcessor = 3;                   // of threads, which their registers allow: all run at a time

// A parameter's entry in the table.
struct Row {
  int64_t parameter, gradient, count, origin;
};

// A parameter's coefficients, in their order.
struct Coefficients {
  float factor, beta1, rest1, beta2, rest2, eps, keep, rate, root;
};

// What a launch is given; qsharded.h says more.
struct Step {
  void *state1, *state2;
  float *absmax1, *absmax2;
  int64_t first_block, blocks;
  const int32_t* row_of_block;
  const int64_t* table;
  const float* coefficients;
  const float* skip;
  const float *map1, *map2, *thresholds1, *thresholds2;
  const uint8_t *below1, *below2;
  // of a launch for one parameter, which then needs no table in the GPU's memory
  Row row;
  Coefficients alone;
};

// Magnitudes in bins that hold one threshold at most: the upper half of a float is its bin, 128 bins an octave, and the
// finest steps, next to 1, are 1.8 bins wide. Below 2^-23 lies no threshold.
constexpr int kFirstBin = 0x34000000 >> 16;
constexpr int kBins = (0x3f800000 >> 16) - kFirstBin + 1;
static_assert(kBins == QSHARDED_ADAMW8BIT_BINS);

// The positive part of a map's thresholds, and for each bin how many lie below it.
template <int kCount>
struct Search {
  float thresholds[kCount + 1];
  uint8_t below[kBins];

  __device__ void fill(const float* all, const uint8_t* all_below) {
    for (int i = threadIdx.x; i <= kCount; i += kThreads) thresholds[i] = i < kCount ? all[i] : INFINITY;
    for (int i = threadIdx.x; i < kBins; i += kThreads) below[i] = all_below[i];
  }

  // How many thresholds lie below a magnitude of at most 1; `or_at`: or at it.
  __device__ int count(float magnitude, bool or_at) const {
    const int bin = max(static_cast<int>(__float_as_uint(magnitude) >> 16) - kFirstBin, 0);
    const int fewest = below[bin];
    const float threshold = thresholds[fewest];
    return fewest + (or_at ? threshold <= magnitude : threshold < magnitude);
  }
};

constexpr int kPositive1 = 128, kPositive2 = 255;  // thresholds above zero
constexpr int kZeroCode = 127;                     // of the signed map

struct Shared {
  float map1[256], map2[256];
  Search<kPositive1> search1;
  Search<kPositive2> search2;

  __device__ void fill(const Step& step) {
    map1[threadIdx.x] = step.map1[threadIdx.x];
    map2[threadIdx.x] = step.map2[threadIdx.x];
    search1.fill(step.thresholds1 + kZeroCode, step.below1);
    search2.fill(step.thresholds2, step.below2);
  }

  // The signed map mirrors its thresholds but for the last, which has no counterpart. What is below zero stays below.
  __device__ unsigned code1(float scaled, float value) const {
    const bool negative = value < 0;  // scaled it may be -0
    const int count = search1.count(fabsf(scaled), negative);
    return negative ? kZeroCode - min(max(count, 1), kZeroCode) : kZeroCode + count;
  }

  __device__ unsigned code2(float scaled) const { return search2.count(scaled, false); }
};

struct Values {
  float of[kVectors][kVector];
};

// Where a lane's values lie in their parameter: vector v begins at `first` + v * kWarp * kVector. Those in
// [0, count) are the parameter's.
struct Place {
  int64_t first, count;
  bool whole;  // the block is all the parameter's, and aligned to its vectors

  __device__ int64_t of(int v) const { return first + v * kWarp * kVector; }
  __device__ bool has(int v, int i) const { return of(v) + i >= 0 && of(v) + i < count; }
};

__device__ void unpack(float4 packed, float (&values)[kVector]) {
  values[0] = packed.x, values[1] = packed.y, values[2] = packed.z, values[3] = packed.w;
}

__device__ void unpack(uint2 packed, float (&values)[kVector]) {
  values[0] = __uint_as_float(packed.x << 16), values[1] = __uint_as_float(packed.x & 0xffff0000u);
  values[2] = __uint_as_float(packed.y << 16), values[3] = __uint_as_float(packed.y & 0xffff0000u);
}

__device__ float4 pack(const float (&values)[kVector], float) {
  return make_float4(values[0], values[1], values[2], values[3]);
}

__device__ uint2 pack(const float (&values)[kVector], __nv_bfloat16) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(values[0], values[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(values[2], values[3]);
  return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

template <typename T>
using Vector = decltype(pack(std::declval<const float (&)[kVector]>(), T()));

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// 0 where the parameter has no value.
template <typename T>
__device__ Values load(const T* from, const Place& place) {
  Values values;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (place.whole) {
      unpack(*reinterpret_cast<const Vector<T>*>(from + place.of(v)), values.of[v]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values.of[v][i] = place.has(v, i) ? to_float(from[place.of(v) + i]) : 0;
    }
  }
  return values;
}

template <typename T>
__device__ void store(T* to, const Place& place, const Values& values) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (place.whole) {
      *reinterpret_cast<Vector<T>*>(to + place.of(v)) = pack(values.of[v], T());
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (place.has(v, i)) to[place.of(v) + i] = static_cast<T>(values.of[v][i]);
      }
    }
  }
}

// A lane's codes of a block, four to a word.
struct Codes {
  uint32_t of[kVectors];
};

// State is aligned whatever the parameter is.
__device__ uint32_t* word_at(void* codes, int64_t block, int v) {
  return static_cast<uint32_t*>(codes) + (block * kStateBlock + v * kWarp * kVector) / kVector + threadIdx.x % kWarp;
}

__device__ Codes load_codes(void* codes, int64_t block) {
  Codes loaded;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) loaded.of[v] = *word_at(codes, block, v);
  return loaded;
}

// The moment behind codes, 0 where the parameter has no value.
__device__ Values decode(const Codes& codes, float scale, const Place& place, const float* map) {
  Values values;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = __fmul_rn(map[codes.of[v] >> (8 * i) & 255], scale);
      values.of[v][i] = place.whole || place.has(v, i) ? value : 0;
    }
  }
  return values;
}

// Write the codes that `code` gives for each value and what its scale leaves of it. Outside the parameter codes stay as they are.
template <typename Code>
__device__ void encode(void* to, const Codes& old, float scale, int64_t block, const Place& place, const Values& values,
                       Code code) {
  const float factor = reciprocal(scale);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    uint32_t word = 0, mask = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float scaled = fminf(fmaxf(__fmul_rn(values.of[v][i], factor), -1.0f), 1.0f);
      word |= code(scaled, values.of[v][i]) << (8 * i);
      mask |= (place.whole || place.has(v, i) ? 255u : 0u) << (8 * i);
    }
    *word_at(to, block, v) = (word & mask) | (old.of[v] & ~mask);
  }
}

// The block's largest magnitude: without their signs floats order as integers do.
__device__ float largest(const Values& values) {
  unsigned most = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) most = max(most, __float_as_uint(fabsf(values.of[v][i])));
  }
  return __uint_as_float(__reduce_max_sync(~0u, most));
}

__device__ void update(const Coefficients& c, float gradient, float& m, float& v, float& p) {
  const float g = __fmul_rn(gradient, c.factor);
  m = __fadd_rn(__fmul_rn(m, c.beta1), __fmul_rn(g, c.rest1));
  v = __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(g, c.rest2), g));
  v = fminf(v, FLT_MAX);  // a v beyond fp32 would decode to NaN for good
  const float divisor = __fadd_rn(__fmul_rn(__fsqrt_rn(v), c.root), c.eps);
  p = __fsub_rn(__fmul_rn(p, c.keep), __fmul_rn(__fdiv_rn(m, divisor), c.rate));
}

// kFiniteOnly: as bitsandbytes has it, a value whose gradient is not finite stays, and its moments become 0.
template <bool kFiniteOnly>
__device__ void update(const Coefficients& c, const Values& gradient, Values* m, Values* v, Values* p) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (kFiniteOnly && !isfinite(gradient.of[j][i])) {
        m->of[j][i] = v->of[j][i] = 0;
      } else {
        update(c, gradient.of[j][i], m->of[j][i], v->of[j][i], p->of[j][i]);
      }
    }
  }
}

template <typename T>
__device__ Place place_of(const Row& row, int64_t block) {
  const int64_t start = block * kStateBlock - row.origin;  // the block's first value
  const int64_t bytes = start * static_cast<int64_t>(sizeof(T));
  const bool aligned = ((row.parameter + bytes) | (row.gradient + bytes)) % sizeof(Vector<T>) == 0;
  return {start + threadIdx.x % kWarp * kVector, row.count, aligned && start >= 0 && start + kStateBlock <= row.count};
}

template <typename T, bool kAlone>
__device__ void step_8_bits(const Step& step, const Shared& shared, int64_t block, int32_t number) {
  // state first: its address is known, that of the gradient is yet to be looked up
  const Codes codes1 = load_codes(step.state1, block), codes2 = load_codes(step.state2, block);
  const float old1 = step.absmax1[block], old2 = step.absmax2[block];
  const Row row = kAlone ? step.row : reinterpret_cast<const Row*>(step.table)[number];
  if (row.gradient == 0) return;
  const Place place = place_of<T>(row, step.first_block + block);
  T* parameter = reinterpret_cast<T*>(row.parameter);
  const Values gradient = load(reinterpret_cast<const T*>(row.gradient), place);
  Values p = load(parameter, place);
  Values m = decode(codes1, old1, place, shared.map1), v = decode(codes2, old2, place, shared.map2);
  const Coefficients& coefficients =
      kAlone ? step.alone : reinterpret_cast<const Coefficients*>(step.coefficients)[number];
  update<kAlone>(coefficients, gradient, &m, &v, &p);
  store(parameter, place, p);
  const float scale1 = largest(m), scale2 = largest(v);
  encode(step.state1, codes1, scale1, block, place, m,
         [&](float scaled, float value) { return shared.code1(scaled, value); });
  encode(step.state2, codes2, scale2, block, place, v, [&](float scaled, float) { return shared.code2(scaled); });
  if (threadIdx.x % kWarp == 0) step.absmax1[block] = scale1, step.absmax2[block] = scale2;
}

template <typename T>
__device__ void step_fp32(const Step& step, int64_t block, int32_t number) {
  const Row row = reinterpret_cast<const Row*>(step.table)[number];
  if (row.gradient == 0) return;
  const Place place = place_of<T>(row, step.first_block + block);
  const Place unaligned = {place.first, place.count, false};
  // so that a parameter's place is its moments' too
  const int64_t to_state = block * kStateBlock + threadIdx.x % kWarp * kVector - place.first;
  float* state1 = static_cast<float*>(step.state1) + to_state;
  float* state2 = static_cast<float*>(step.state2) + to_state;
  T* parameter = reinterpret_cast<T*>(row.parameter);
  const Values gradient = load(reinterpret_cast<const T*>(row.gradient), place);
  Values p = load(parameter, place), m = load(state1, unaligned), v = load(state2, unaligned);
  update<false>(reinterpret_cast<const Coefficients*>(step.coefficients)[number], gradient, &m, &v, &p);
  store(parameter, place, p);
  store(state1, unaligned, m);
  store(state2, unaligned, v);
}

template <bool kAlone>
__device__ int32_t row_of(const Step& step, int64_t block) {
  if constexpr (kAlone) return 0;
  return block < step.blocks ? step.row_of_block[block] : 0;
}

// A warp takes one block after the other. kAlone: all are of one parameter.
template <typename T, bool kQuantized, bool kAlone>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) adamw_kernel(Step step) {
  __shared__ Shared shared;
  if constexpr (!kAlone) {
    if (*step.skip != 0) return;
  }
  if constexpr (kQuantized) {
    shared.fill(step);
    __syncthreads();
  }
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  int32_t number = row_of<kAlone>(step, block);
  for (; block < step.blocks; block += warps) {
    const int32_t next = row_of<kAlone>(step, block + warps);  // on its way meanwhile
    if constexpr (kQuantized) {
      step_8_bits<T, kAlone>(step, shared, block, number);
    } else {
      step_fp32<T>(step, block, number);
    }
    number = next;
  }
}

int processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename T>
int launch(const Step& step, cudaStream_t stream) {
  if (step.blocks == 0) return QSHARDED_OK;
  const unsigned needed = ceil_div(step.blocks, kThreads / kWarp);
  const unsigned grid = min(needed, static_cast<unsigned>(processors() * kBlocksPerProcessor));
  if (step.table == nullptr) {
    adamw_kernel<T, true, true><<<grid, kThreads, 0, stream>>>(step);
  } else if (step.absmax1 != nullptr) {
    adamw_kernel<T, true, false><<<grid, kThreads, 0, stream>>>(step);
  } else {
    adamw_kernel<T, false, false><<<grid, kThreads, 0, stream>>>(step);
  }
  return launch_result();
}

int launch(const Step& step, int dtype, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == QSHARDED_FLOAT32) return launch<float>(step, on);
  if (dtype == QSHARDED_BFLOAT16) return launch<__nv_bfloat16>(step, on);
  return QSHARDED_BAD_DTYPE;
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_adamw8bit(void* state1, void* state2, float* absmax1, float* absmax2, int64_t first_block,
                            int64_t blocks, const int32_t* row_of_block, const int64_t* table,
                            const float* coefficients, const float* skip, const float* map1, const float* map2,
                            const float* thresholds1, const float* thresholds2, const uint8_t* below1,
                            const uint8_t* below2, int dtype, void* stream) {
  const Step step = {state1,       state2, absmax1, absmax2, first_block, blocks,      row_of_block, table,
                     coefficients, skip,   map1,    map2,    thresholds1, thresholds2, below1,       below2};
  return launch(step, dtype, stream);
}

int qsharded_cuda_adamw8bit_alone(void* parameter, const void* gradient, int64_t count, void* state1, void* state2,
                                  float* absmax1, float* absmax2, const float* coefficients, const float* map1,
                                  const float* map2, const float* thresholds1, const float* thresholds2,
                                  const uint8_t* below1, const uint8_t* below2, int dtype, void* stream) {
  Step step = {state1,  state2,  absmax1, absmax2, 0,           count / kStateBlock, nullptr, nullptr,
               nullptr, nullptr, map1,    map2,    thresholds1, thresholds2,         below1,  below2};
  step.row = {reinterpret_cast<int64_t>(parameter), reinterpret_cast<int64_t>(gradient), count, 0};
  std::memcpy(&step.alone, coefficients, sizeof(step.alone));
  return launch(step, dtype, stream);
}
