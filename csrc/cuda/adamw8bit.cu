// AdamW on moments kept in 8 bits: the parameters of one type behind consecutive blocks of state, in one launch.
// The arithmetic is that of qsharded.optim.reference, rounded after each operation.
//
//   state block: 256 values of each moment, one scale each; a warp's, kVectors vectors of kVector values a lane
//   codes --map1, map2--> fp32 moments --AdamW--> parameter
//                                      --largest magnitude over the warp--> scale --search1, search2--> codes
//   shared memory: both maps and both search tables, loaded once by each CTA
//
// Warps take state blocks in turn; a block that lies whole within its parameter has code of its own (kWhole).
#include <cuda_bf16.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "bulk_copy.cuh"
#include "launch.cuh"

namespace qsharded {
namespace {

constexpr int kThreads = 256;
constexpr int kStateBlock = 256;                         // values of a moment that share a scale
constexpr int kVector = 4;                               // consecutive values of a lane
constexpr int kVectors = kStateBlock / kWarp / kVector;  // a warp has one block
constexpr int kCtasPerSm = 3;                            // which their registers allow: all run at a time

// ---- What a launch is given ----

// qsharded.h says more.
struct Step {
  void *state1, *state2;
  float *absmax1, *absmax2;
  int64_t first_block, blocks;
  const int32_t* row_of_block;
  const int64_t* table;
  const float* coefficients;
  const float* skip;
  const float *map1, *map2;
  const uint32_t *search1, *search2;
};

// A parameter's entry in the table.
struct Row {
  int64_t parameter, gradient, count, origin;
};

// A parameter's coefficients, in their order.
struct Coefficients {
  float factor, beta1, rest1, beta2, rest2, eps, keep, rate, root;
};

// ---- Maps and search tables ----

// Magnitudes in bins that hold one threshold at most: the upper half of a float is its bin, 128 bins an octave, and the
// finest steps, next to 1, are 1.8 bins wide. Below 2^-23 lies no threshold.
constexpr float kLeastMagnitude = 0x1p-23f;
constexpr int kFirstBin = 0x34000000 >> 16;
constexpr int kBins = (0x3f800000 >> 16) - kFirstBin + 1;
static_assert(kBins == QSHARDED_ADAMW8BIT_BINS);

constexpr unsigned kWord = sizeof(uint32_t);

// Dot products make addresses in one instruction off the integer pipe, which is the busiest.
__device__ uint32_t shared_word(unsigned address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// Both maps, and what finds the codes of both.
struct Tables {
  float map1[256], map2[256];
  uint32_t search1[2 * kBins], search2[kBins];

  __device__ void fill(const Step& step) {
    map1[threadIdx.x] = step.map1[threadIdx.x];
    map2[threadIdx.x] = step.map2[threadIdx.x];
    for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) search1[i] = step.search1[i];
    for (int i = threadIdx.x; i < kBins; i += kThreads) search2[i] = step.search2[i];
  }

  // The map's entry for code `i` of four.
  __device__ static float decoded(const float* map, uint32_t codes, int i) {
    return __uint_as_float(shared_word(__dp4a(codes, kWord << (8 * i), shared_address(map))));
  }

  // Codes are in bits 16 to 23: an entry has the code at the beginning of its bin, and what makes the lower half
  // overflow into it from the threshold on.
  __device__ unsigned code1(float scaled) const {
    const int sign = __float_as_int(scaled) >> 31;
    return sum(search1, sign * -kBins, fabsf(scaled)) ^ sign;
  }

  __device__ unsigned code2(float scaled) const { return sum(search2, 0, scaled); }

 private:
  // The sum of a magnitude's bits and the entry of its bin, counted from entry `first`.
  __device__ static unsigned sum(const uint32_t* search, int first, float magnitude) {
    const unsigned bits = __float_as_uint(fmaxf(magnitude, kLeastMagnitude));
    const unsigned bin_0 = shared_address(search) + (first - kFirstBin) * kWord;
    return shared_word(__dp2a_lo(bits, kWord << 8, bin_0)) + bits;  // the upper half times the size of a word
  }
};

// ---- A parameter's entry in the tables ----

// A record in a warp's hands, a word a lane: fetching it takes one load, and keeping it one register.
template <typename Record>
struct Spread {
  uint32_t word;

  __device__ static Spread load(const Record* from) {
    const int lane = threadIdx.x % kWarp;
    return {lane < kWords ? reinterpret_cast<const uint32_t*>(from)[lane] : 0};
  }

  __device__ Record collect() const {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(~0u, word, i);
    Record record;
    memcpy(&record, words, sizeof(record));
    return record;
  }

 private:
  static constexpr int kWords = sizeof(Record) / sizeof(uint32_t);
  static_assert(kWords <= kWarp);
};

// What the tables say of a block's parameter.
struct Entry {
  Spread<Row> row;
  Spread<Coefficients> coefficients;

  __device__ static Entry load(const Step& step, int32_t number) {
    return {Spread<Row>::load(reinterpret_cast<const Row*>(step.table) + number),
            Spread<Coefficients>::load(reinterpret_cast<const Coefficients*>(step.coefficients) + number)};
  }
};

// ---- A lane's values, loaded and stored ----

struct Values {
  float of[kVectors][kVector];
};

// For each value of a lane: its vector and its place there.
template <typename Function>
__device__ void for_each(Function function) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) function(v, i);
  }
}

// Where a lane's values lie in their parameter: vector v begins at `first` + v * kWarp * kVector. Those in
// [0, count) are the parameter's; all are where the block is whole, and its vectors are aligned then.
template <bool kWhole>
struct Place {
  int64_t first, count;

  __device__ int64_t of(int v) const { return first + v * kWarp * kVector; }
  __device__ bool has(int v, int i) const { return kWhole || (of(v) + i >= 0 && of(v) + i < count); }
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
template <typename T, bool kWhole>
__device__ Values load(const T* from, const Place<kWhole>& place) {
  Values values;
  if constexpr (kWhole) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack(*reinterpret_cast<const Vector<T>*>(from + place.of(v)), values.of[v]);
  } else {
    for_each([&](int v, int i) { values.of[v][i] = place.has(v, i) ? to_float(from[place.of(v) + i]) : 0; });
  }
  return values;
}

template <typename T, bool kWhole>
__device__ void store(T* to, const Place<kWhole>& place, const Values& values) {
  if constexpr (kWhole) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector<T>*>(to + place.of(v)) = pack(values.of[v], T());
  } else {
    for_each([&](int v, int i) {
      if (place.has(v, i)) to[place.of(v) + i] = static_cast<T>(values.of[v][i]);
    });
  }
}

// ---- Codes, decoded and encoded ----

// A lane's codes of a block, four to a word.
struct Codes {
  uint32_t of[kVectors];
};

// State is aligned whatever the parameter is.
__device__ uint32_t* word_at(void* codes, int block, int v) {
  const int64_t vector = static_cast<int64_t>(block) * kVectors + v;
  return static_cast<uint32_t*>(codes) + vector * kWarp + threadIdx.x % kWarp;
}

__device__ Codes load_codes(void* codes, int block) {
  Codes loaded;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) loaded.of[v] = *word_at(codes, block, v);
  return loaded;
}

// The moment behind codes, 0 where the parameter has no value.
template <bool kWhole>
__device__ Values decode(const Codes& codes, float scale, const Place<kWhole>& place, const float* map) {
  Values values;
  for_each([&](int v, int i) {
    const float value = __fmul_rn(Tables::decoded(map, codes.of[v], i), scale);
    values.of[v][i] = place.has(v, i) ? value : 0;
  });
  return values;
}

// The third bytes of four words.
__device__ uint32_t third_bytes(const unsigned (&words)[kVector]) {
  return __byte_perm(__byte_perm(words[0], words[1], 0x62), __byte_perm(words[2], words[3], 0x62), 0x5410);
}

template <bool kWhole>
__device__ uint32_t mask_of(const Place<kWhole>& place, int v) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) mask |= (place.has(v, i) ? 255u : 0u) << (8 * i);
  return mask;
}

// Write the codes that `code` gives, in bits 16 to 23, for what the scale leaves of each value. Outside the parameter
// codes stay as they are.
template <bool kWhole, typename Code>
__device__ void encode(void* to, const Codes& old, float scale, int block, const Place<kWhole>& place,
                       const Values& values, Code code) {
  const float factor = reciprocal(scale);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    unsigned words[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // + 0: -0 becomes 0, so that only what is below zero has a sign, though it may have become -0 by the scale
      words[i] = code(__fmaf_rn(values.of[v][i], factor, 0.0f));
    }
    const uint32_t mask = mask_of(place, v);
    *word_at(to, block, v) = (third_bytes(words) & mask) | (old.of[v] & ~mask);
  }
}

__device__ float most(const Values& values) {
  float found = 0;
  for_each([&](int v, int i) { found = fmaxf(found, fabsf(values.of[v][i])); });
  return found;
}

__device__ float least(const Values& values) {
  float found = INFINITY;
  for_each([&](int v, int i) { found = fminf(found, fabsf(values.of[v][i])); });
  return found;
}

// The block's largest magnitude: without their signs floats order as integers do.
__device__ float largest(const Values& values) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most(values))));
}

// ---- AdamW ----

// What becomes of a value whose gradient is not finite. The optimizer looks for such a gradient before it launches and
// skips the step; bitsandbytes leaves the value as it is, and its moments become 0.
enum class NotFinite { kUnknown, kStays };

template <NotFinite kRule>
__device__ bool stays(float gradient) {
  return kRule == NotFinite::kStays && !isfinite(gradient);
}

template <NotFinite kRule>
__device__ void update_moments(const Coefficients& c, const Values& gradient, Values* m, Values* v) {
  for_each([&](int j, int i) {
    if (stays<kRule>(gradient.of[j][i])) {
      m->of[j][i] = v->of[j][i] = 0;
      return;
    }
    const float g = __fmul_rn(gradient.of[j][i], c.factor);
    m->of[j][i] = __fadd_rn(__fmul_rn(m->of[j][i], c.beta1), __fmul_rn(g, c.rest1));
    v->of[j][i] = __fadd_rn(__fmul_rn(v->of[j][i], c.beta2), __fmul_rn(__fmul_rn(g, c.rest2), g));
  });
}

// A v beyond fp32 would decode to NaN for good.
__device__ void limit(Values* v) {
  for_each([&](int j, int i) { v->of[j][i] = fminf(v->of[j][i], FLT_MAX); });
}

// Whether roots and quotients, and what they leave, stay clear of fp32's ends: divisors are 2^-50 to 2^21, quotients
// 2^-121 to 2^110.
__device__ bool moderate(const Coefficients& c, const Values& m, const Values& v, float most_m, float most_v) {
  const bool usual = c.root >= 1 && c.root <= 0x1p10f && c.eps <= 1;
  return usual & (fminf(least(m), least(v)) >= 0x1p-100f) & (most_m <= 0x1p60f) & (most_v <= 0x1p20f);
}

// What __fsqrt_rn and __fdiv_rn do with moderate values, without their checks of each and the branches to the rest.
__device__ float moderate_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(y, 0.5f), root);
}

__device__ float moderate_quotient(float x, float divisor) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(divisor));
  y = __fmaf_rn(__fmaf_rn(-divisor, y, 1.0f), y, y);  // the correctly rounded reciprocal
  const float quotient = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-divisor, quotient, x), y, quotient);
}

template <bool kModerate>
__device__ void update_parameters(const Coefficients& c, const Values& m, const Values& v, Values* p) {
  for_each([&](int j, int i) {
    const float deviation = kModerate ? moderate_root(v.of[j][i]) : __fsqrt_rn(v.of[j][i]);
    const float divisor = __fadd_rn(__fmul_rn(deviation, c.root), c.eps);
    const float ratio = kModerate ? moderate_quotient(m.of[j][i], divisor) : __fdiv_rn(m.of[j][i], divisor);
    p->of[j][i] = __fsub_rn(__fmul_rn(p->of[j][i], c.keep), __fmul_rn(ratio, c.rate));
  });
}

template <typename T, NotFinite kRule, bool kWhole>
__device__ void step_8_bits(const Step& step, const Tables& tables, int block, const Place<kWhole>& place,
                            const Row& row, const Coefficients& c) {
  T* parameter = reinterpret_cast<T*>(row.parameter);
  const Codes codes1 = load_codes(step.state1, block), codes2 = load_codes(step.state2, block);
  const Values gradient = load(reinterpret_cast<const T*>(row.gradient), place);
  Values p = load(parameter, place);
  const Values old = p;
  Values m = decode(codes1, step.absmax1[block], place, tables.map1);
  Values v = decode(codes2, step.absmax2[block], place, tables.map2);
  update_moments<kRule>(c, gradient, &m, &v);
  const float scale1 = largest(m);
  float scale2 = largest(v);
  if (__all_sync(~0u, moderate(c, m, v, scale1, scale2))) {
    update_parameters<true>(c, m, v, &p);
  } else {
    limit(&v);
    scale2 = fminf(scale2, FLT_MAX);
    update_parameters<false>(c, m, v, &p);
  }
  for_each([&](int j, int i) {
    if (stays<kRule>(gradient.of[j][i])) p.of[j][i] = old.of[j][i];
  });
  store(parameter, place, p);
  encode(step.state1, codes1, scale1, block, place, m, [&](float scaled) { return tables.code1(scaled); });
  encode(step.state2, codes2, scale2, block, place, v, [&](float scaled) { return tables.code2(scaled); });
  if (threadIdx.x % kWarp == 0) step.absmax1[block] = scale1, step.absmax2[block] = scale2;
}

template <typename T>
__device__ void step_fp32(const Step& step, int block, const Place<false>& place, const Row& row,
                          const Coefficients& c) {
  // so that a parameter's place is its moments' too
  const int64_t to_state = static_cast<int64_t>(block) * kStateBlock + threadIdx.x % kWarp * kVector - place.first;
  float* state1 = static_cast<float*>(step.state1) + to_state;
  float* state2 = static_cast<float*>(step.state2) + to_state;
  T* parameter = reinterpret_cast<T*>(row.parameter);
  const Values gradient = load(reinterpret_cast<const T*>(row.gradient), place);
  Values p = load(parameter, place), m = load(state1, place), v = load(state2, place);
  update_moments<NotFinite::kUnknown>(c, gradient, &m, &v);
  limit(&v);
  update_parameters<false>(c, m, v, &p);
  store(parameter, place, p);
  store(state1, place, m);
  store(state2, place, v);
}

template <typename T, bool kQuantized, NotFinite kRule = NotFinite::kUnknown>
__device__ void step_block(const Step& step, const Tables& tables, int block, const Row& row, const Coefficients& c) {
  if (row.gradient == 0) return;
  const int64_t start = (step.first_block + block) * kStateBlock - row.origin;  // the block's first value
  const int64_t first = start + threadIdx.x % kWarp * kVector;
  const int64_t bytes = start * static_cast<int64_t>(sizeof(T));
  const bool aligned = ((row.parameter + bytes) | (row.gradient + bytes)) % sizeof(Vector<T>) == 0;
  if constexpr (!kQuantized) {
    step_fp32<T>(step, block, {first, row.count}, row, c);
  } else if (aligned && start >= 0 && start + kStateBlock <= row.count) {
    step_8_bits<T, kRule, true>(step, tables, block, {first, row.count}, row, c);
  } else {
    step_8_bits<T, kRule, false>(step, tables, block, {first, row.count}, row, c);
  }
}

// ---- Kernels ----

// A warp takes one block after the other, and looks up ahead what the tables say: else a block would begin with three
// loads one after the other.
template <typename T, bool kQuantized>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) adamw_kernel(Step step) {
  __shared__ Tables tables;
  if (*step.skip != 0) return;
  if constexpr (kQuantized) {
    tables.fill(step);
    __syncthreads();
  }
  const int blocks = static_cast<int>(step.blocks), warps = gridDim.x * (kThreads / kWarp);
  const auto row_of = [&](int block) { return step.row_of_block[min(block, blocks - 1)]; };
  int block = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  Entry next = Entry::load(step, row_of(block));
  int32_t number = row_of(block + warps);
  for (; block < blocks; block += warps) {
    const Entry entry = next;
    next = Entry::load(step, number);
    number = row_of(block + 2 * warps);
    step_block<T, kQuantized>(step, tables, block, entry.row.collect(), entry.coefficients.collect());
  }
}

// The same for blocks that are all one parameter's: what the tables would say comes with the launch.
template <typename T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    adamw_alone_kernel(const __grid_constant__ Step step, const __grid_constant__ Row row,
                       const __grid_constant__ Coefficients coefficients) {
  __shared__ Tables tables;
  tables.fill(step);
  __syncthreads();
  const int blocks = static_cast<int>(step.blocks), warps = gridDim.x * (kThreads / kWarp);
  for (int block = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp; block < blocks; block += warps) {
    step_block<T, true, NotFinite::kStays>(step, tables, block, row, coefficients);
  }
}

template <typename... Parameters, typename... Arguments>
int launch_for(int64_t blocks, void (*kernel)(Parameters...), cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return QSHARDED_OK;
  int at_a_time = 0;  // on an SM, whose shared memory may hold fewer than its registers
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_a_time, kernel, kThreads, 0);
  const unsigned needed = ceil_div(blocks, kThreads / kWarp);
  const unsigned grid = min(needed, static_cast<unsigned>(Device::current().sms * at_a_time));
  kernel<<<grid, kThreads, 0, stream>>>(arguments...);
  return launch_result();
}

template <typename T>
int launch(const Step& step, cudaStream_t stream) {
  return launch_for(step.blocks, step.absmax1 != nullptr ? adamw_kernel<T, true> : adamw_kernel<T, false>, stream, step);
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_adamw8bit(void* state1, void* state2, float* absmax1, float* absmax2, int64_t first_block,
                            int64_t blocks, const int32_t* row_of_block, const int64_t* table,
                            const float* coefficients, const float* skip, const float* map1, const float* map2,
                            const uint32_t* search1, const uint32_t* search2, int dtype, void* stream) {
  const Step step = {state1, state2,       absmax1, absmax2, first_block, blocks,  row_of_block,
                     table,  coefficients, skip,    map1,    map2,        search1, search2};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == QSHARDED_FLOAT32) return launch<float>(step, on);
  if (dtype == QSHARDED_BFLOAT16) return launch<__nv_bfloat16>(step, on);
  return QSHARDED_BAD_DTYPE;
}

int qsharded_cuda_adamw8bit_alone(void* parameter, const void* gradient, int64_t count, void* state1, void* state2,
                                  float* absmax1, float* absmax2, const float* coefficients, const float* map1,
                                  const float* map2, const uint32_t* search1, const uint32_t* search2, int dtype,
                                  void* stream) {
  const Step step = {state1,  state2,  absmax1, absmax2, 0,    count / kStateBlock, nullptr,
                     nullptr, nullptr, nullptr, map1,    map2, search1,             search2};
  const Row row = {reinterpret_cast<int64_t>(parameter), reinterpret_cast<int64_t>(gradient), count, 0};
  Coefficients c;
  std::memcpy(&c, coefficients, sizeof(c));
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == QSHARDED_FLOAT32) return launch_for(step.blocks, adamw_alone_kernel<float>, on, step, row, c);
  if (dtype == QSHARDED_BFLOAT16) return launch_for(step.blocks, adamw_alone_kernel<__nv_bfloat16>, on, step, row, c);
  return QSHARDED_BAD_DTYPE;
}
