// NF4 dequantize: out = codebook[code] * absmax in fp32, rounded once; absmax of 8 bits is decoded in the same pass.
//
//   a warp's run, in bf16:  round 0: | block 0: lanes 0 to 7 | block 1: lanes 8 to 15 | block 2 | block 3 |
//                           round 1: | block 4 ..            |                        |         |         |   kRounds rounds
//   lane i: loads 4 bytes of codes a round, decodes the absmax of block i of the run, gets the others' by shuffles,
//           and stores 16 bytes of weights a round
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4.cuh"

namespace qsharded {
namespace {

// ---- Sizes, and what a lane holds ----

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
  Divider() = default;
  explicit Divider(unsigned divisor) : divisor_(divisor) {
    while (divisor > 1ull << (shift_ - 31)) ++shift_;
    magic_ = static_cast<unsigned>(((1ull << shift_) + divisor - 1) / divisor);
  }
  __device__ unsigned quotient(unsigned number) const {
    return static_cast<unsigned>(static_cast<uint64_t>(number) * magic_ >> shift_);
  }
  __device__ unsigned divisor() const { return divisor_; }

 private:
  unsigned divisor_ = 1;
  int shift_ = 31;  // 31 + ceil(log2(divisor)): the quotient's error stays below 1 / divisor
  unsigned magic_ = 0;
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

// 16 bytes of weights. codebook lies in shared memory: its 16 entries are in 16 banks, so no look-up waits for another.
template <typename Out>
__device__ uint4 decode(uint32_t codes, float absmax, const float* codebook) {
  // every nibble times four: a byte's offset into the codebook
  const uint32_t first = codes >> 2 & 0x3C3C3C3Cu;
  const uint32_t second = codes << 2 & 0x3C3C3C3Cu;
  const auto value = [codebook](uint32_t offsets, int byte) {
    const char* base = reinterpret_cast<const char*>(codebook);
    return *reinterpret_cast<const float*>(base + __byte_perm(offsets, 0, 0x4440 + byte));
  };
  uint4 out;
  auto* pairs = reinterpret_cast<typename Vector<Out>::Pair*>(&out);
#pragma unroll
  for (int i = 0; i < Vector<Out>::kPairs; ++i) {
    store_pair(pairs + i, __fmul_rn(value(first, i), absmax), __fmul_rn(value(second, i), absmax));
  }
  return out;
}

// ---- One weight ----

// A warp decodes a run of blocks, the `number`th, each lane the absmax of one, and needs no other warp: no barrier, and
// while one waits for memory the others write. With kHasGap there are out_gap vectors between a row's end and the next
// row.
template <typename Out, bool kDoubleQuant, bool kHasGap>
__device__ void dequantize_run(unsigned number, const typename Vector<Out>::Codes* codes, unsigned blocks,
                               const Absmax& absmax, const float* codebook, uint4* out, int64_t out_gap) {
  constexpr int kLanes = Vector<Out>::kLanes;
  __shared__ float own_codebook[kWarps][16];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned first_block = number * Vector<Out>::kWarpBlocks;
  const int64_t first_vector = static_cast<int64_t>(first_block) * kLanes + lane;
  // how far this lane's vectors reach, in strides of a warp; beyond the last block not at all
  const int64_t left = static_cast<int64_t>(blocks) * kLanes - first_vector;
  const int inside = static_cast<int>(min(max(left, int64_t{0}), int64_t{kRounds * kWarp}));
  codes += first_vector;
  out += first_vector;

  typename Vector<Out>::Codes loaded[kRounds];  // all in flight before the first is used
#pragma unroll
  for (int i = 0; i < kRounds; ++i) loaded[i] = i * kWarp < inside ? __ldcs(codes + i * kWarp) : 0;
  if (lane < 16) own_codebook[warp][lane] = __ldg(codebook + lane);
  const unsigned block = first_block + lane % Vector<Out>::kWarpBlocks;
  const float own_absmax = block < blocks ? absmax.template at<kDoubleQuant>(block) : 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const float its_absmax = __shfl_sync(~0u, own_absmax, (i * kWarp + lane) / kLanes);
    const uint4 weights = decode<Out>(loaded[i], its_absmax, own_codebook[warp]);
    int64_t at = i * kWarp;
    if constexpr (kHasGap) at += absmax.blocks_per_row.quotient(first_block + (i * kWarp + lane) / kLanes) * out_gap;
    if (i * kWarp < inside) __stcs(out + at, weights);
  }
}

template <typename Out, bool kDoubleQuant, bool kHasGap>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const typename Vector<Out>::Codes* codes, unsigned blocks, Absmax absmax, const float* codebook,
                      uint4* out, int64_t out_gap) {
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  dequantize_run<Out, kDoubleQuant, kHasGap>(warp, codes, blocks, absmax, codebook, out, out_gap);
}

template <typename Out>
int dequantize(const uint8_t* codes, unsigned blocks, const Absmax& absmax, const float* codebook, void* out,
               int64_t out_gap, cudaStream_t stream) {
  constexpr int kVector = 2 * Vector<Out>::kPairs;  // weights
  if (out_gap % kVector) return QSHARDED_BAD_SIZE;
  const auto dense = absmax.scales ? dequantize_kernel<Out, true, false> : dequantize_kernel<Out, false, false>;
  const auto with_gap = absmax.scales ? dequantize_kernel<Out, true, true> : dequantize_kernel<Out, false, true>;
  (out_gap ? with_gap : dense)<<<ceil_div(blocks, kWarps * Vector<Out>::kWarpBlocks), kThreads, 0, stream>>>(
      reinterpret_cast<const typename Vector<Out>::Codes*>(codes), blocks, absmax, codebook, static_cast<uint4*>(out),
      out_gap / kVector);
  return launch_result();
}

// ---- Several weights, with adapters behind their rows ----

// Several weights of the same K, one below the other, and behind each row R entries: the row of the weight's scaled B in
// its own columns, zeros in the others.

constexpr int kMostParts = 4;

struct Part {
  const uint32_t* codes;
  Absmax absmax;
  uint4* out;               // of its first row
  unsigned blocks;          // of weights
  unsigned first_cta;       // of those that write its weights
  unsigned first_tail_cta;  // of those that write what is behind them
  int64_t tails;            // 16-byte vectors behind its rows
  const void* b;            // [rows, rank], or null
  bool b_is_float;
  float scale;
  int rank, column;
};

struct Parts {
  Part of[kMostParts];
  int count;
  Divider tail_vectors;  // behind a row
  int64_t row_vectors;   // with what is behind it and unused room
  int64_t weight_vectors;
};

__device__ inline float adapter_entry(const Part& part, int64_t row, int column) {
  const int own = column - part.column;
  if (own < 0 || own >= part.rank || part.b == nullptr) return 0;
  const int64_t at = row * part.rank + own;
  const float value = part.b_is_float ? static_cast<const float*>(part.b)[at]
                                      : __bfloat162float(static_cast<const __nv_bfloat16*>(part.b)[at]);
  return value * part.scale;
}

__device__ void write_tail(const Part& part, const Parts& parts, int64_t number) {
  const auto row = parts.tail_vectors.quotient(static_cast<unsigned>(number));
  const int64_t vector = number - row * parts.tail_vectors.divisor();
  uint4 out;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = static_cast<int>(vector) * 8 + 2 * i;
    pairs[i] = __floats2bfloat162_rn(adapter_entry(part, row, column), adapter_entry(part, row, column + 1));
  }
  part.out[row * parts.row_vectors + parts.weight_vectors + vector] = out;
}

template <bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads)
    dequantize_parts_kernel(const __grid_constant__ Parts parts, const float* codebook) {
  int which = 0;
  while (which + 1 < parts.count && blockIdx.x >= parts.of[which + 1].first_cta) ++which;
  const Part& part = parts.of[which];
  if (blockIdx.x >= part.first_tail_cta) {
    const int64_t number = static_cast<int64_t>(blockIdx.x - part.first_tail_cta) * kThreads + threadIdx.x;
    if (number < part.tails) write_tail(part, parts, number);
    return;
  }
  const unsigned warp = (blockIdx.x - part.first_cta) * kWarps + threadIdx.x / kWarp;
  dequantize_run<__nv_bfloat16, kDoubleQuant, true>(warp, part.codes, part.blocks, part.absmax, codebook, part.out,
                                                    parts.row_vectors - parts.weight_vectors);
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row, const void* absmax,
                                 int64_t absmax_row_stride, const float* absmax_scales, const float* absmax_offset,
                                 const float* absmax_map, const float* codebook, void* out, int64_t out_row_stride,
                                 int dtype, void* stream) {
  const int64_t blocks = rows * blocks_per_row;
  if (blocks == 0) return QSHARDED_OK;
  if (blocks > kMostBlocks) return QSHARDED_BAD_SIZE;
  const Absmax source = {absmax,        absmax_row_stride - blocks_per_row, Divider(blocks_per_row),
                         absmax_scales, absmax_offset,                      absmax_map};
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  const int64_t gap = out_row_stride - blocks_per_row * kBlock;
  if (dtype == QSHARDED_BFLOAT16) return dequantize<__nv_bfloat16>(codes, count, source, codebook, out, gap, on);
  if (dtype == QSHARDED_FLOAT16) return dequantize<__half>(codes, count, source, codebook, out, gap, on);
  if (dtype == QSHARDED_FLOAT32) return dequantize<float>(codes, count, source, codebook, out, gap, on);
  return QSHARDED_BAD_DTYPE;
}

int qsharded_cuda_nf4_dequantize_parts(const qsharded_part* given, int count, int64_t blocks_per_row, int64_t tail,
                                       const float* absmax_map, const float* codebook, void* out, int64_t out_row_stride,
                                       void* stream) {
  constexpr int kVector = 8;
  const int64_t width = blocks_per_row * kBlock;
  if (count < 1 || count > kMostParts || tail < 0 || tail % kVector || out_row_stride % kVector) return QSHARDED_BAD_SIZE;
  if (out_row_stride < width + tail) return QSHARDED_BAD_SIZE;
  Parts parts = {{}, count, Divider(tail ? tail / kVector : 1), out_row_stride / kVector, width / kVector};
  unsigned ctas = 0;
  auto* rows_out = static_cast<uint4*>(out);
  for (int i = 0; i < count; ++i) {
    const qsharded_part& one = given[i];
    const int64_t blocks = one.rows * blocks_per_row, tails = one.rows * (tail / kVector);
    if (blocks > kMostBlocks || tails > kMostBlocks) return QSHARDED_BAD_SIZE;
    if ((one.absmax_scales == nullptr) != (given[0].absmax_scales == nullptr)) return QSHARDED_BAD_DTYPE;
    Part& part = parts.of[i];
    part.codes = reinterpret_cast<const uint32_t*>(one.codes);
    part.absmax = {one.absmax,        one.absmax_row_stride - blocks_per_row, Divider(blocks_per_row),
                   one.absmax_scales, one.absmax_offset,                      absmax_map};
    part.out = rows_out;
    part.blocks = static_cast<unsigned>(blocks);
    part.first_cta = ctas;
    ctas += ceil_div(part.blocks, kWarps * Vector<__nv_bfloat16>::kWarpBlocks);
    part.first_tail_cta = ctas;
    ctas += ceil_div(static_cast<unsigned>(tails), kThreads);
    part.tails = tails;
    part.b = one.b;
    part.b_is_float = one.b_dtype == QSHARDED_FLOAT32;
    part.scale = one.scale;
    part.rank = static_cast<int>(one.rank);
    part.column = static_cast<int>(one.column);
    rows_out += one.rows * parts.row_vectors;
  }
  if (ctas == 0) return QSHARDED_OK;
  const auto kernel = given[0].absmax_scales ? dequantize_parts_kernel<true> : dequantize_parts_kernel<false>;
  kernel<<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(parts, codebook);
  return launch_result();
}
