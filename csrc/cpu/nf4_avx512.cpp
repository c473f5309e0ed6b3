// NF4 with AVX-512 (F, BW, VL): a codebook of 16 fits one register and 32 bins fit two, so a look-up is one permutation.
#include <algorithm>
#include <cmath>

#include "nf4_kernels.h"
#include "scalar_types.h"

#if defined(__x86_64__)
#include <immintrin.h>

// On every function that uses the instructions: the file itself is compiled for any x86-64, and runs only when chosen.
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,f16c")))

namespace qsharded {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kBlock / kLanes;

AVX512 inline __m512 load(const float* weight) { return _mm512_loadu_ps(weight); }

AVX512 inline __m512 load(const Float16* weight) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight)));
}

// [-1, 1] in 31 bins narrower than any two midpoints are apart: a bin has one midpoint at most, so one comparison ends
// the search, and two registers hold a value for each bin.
struct Bins {
  __m512 midpoint[2];  // infinity where the bin has none
  __m512i below[2];    // midpoints in the bins below
};

// In the lower 5 bits the bin, never falling as `scaled` grows. NaN has a bin too.
AVX512 inline __m512i bins_of(__m512 scaled) {
  const __m512 adjust = _mm512_set1_ps(0x1p23f + 15);  // beside 2^23 a float's last bit is 1
  return _mm512_castps_si512(_mm512_fmadd_ps(scaled, _mm512_set1_ps(15), adjust));
}

AVX512 inline Bins bins_of(const float* midpoints) {
  float midpoint[2 * kLanes];
  int32_t below[2 * kLanes] = {};
  std::fill_n(midpoint, 2 * kLanes, INFINITY);
  for (int i = 0; i < kMidpoints; ++i) {
    const int bin = _mm512_cvtsi512_si32(bins_of(_mm512_set1_ps(midpoints[i]))) & 31;
    midpoint[bin] = midpoints[i];
    for (int above = bin + 1; above < 2 * kLanes; ++above) ++below[above];
  }
  return {{_mm512_loadu_ps(midpoint), _mm512_loadu_ps(midpoint + kLanes)},
          {_mm512_loadu_si512(below), _mm512_loadu_si512(below + kLanes)}};
}

AVX512 inline __m512i encode(__m512 scaled, const Bins& bins) {
  const __m512i bin = bins_of(scaled);
  const __m512 midpoint = _mm512_permutex2var_ps(bins.midpoint[0], bin, bins.midpoint[1]);
  const __m512i below = _mm512_permutex2var_epi32(bins.below[0], bin, bins.below[1]);
  const __mmask16 above = _mm512_cmp_ps_mask(scaled, midpoint, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
}

// A block's codes in order, as 32-bit lanes, to bytes.
AVX512 inline __m256i pack(const __m512i* code) {
  const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]));
  // all packs work in 128-bit quarters; this puts groups of four codes back into order
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i codes = _mm512_permutexvar_epi32(order, bytes);
  return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)));  // first * 16 + second * 1
}

AVX512 inline float largest_magnitude(const __m512* values) {
  // without their sign bits floats order as integers do
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < kVectors; ++i)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude));
  return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
}

AVX512 inline __m512 reciprocal_of(float absmax) {
  return _mm512_set1_ps(1.0f / (absmax > kSmallestAbsmax ? absmax : kSmallestAbsmax));
}

template <typename T>
AVX512 void encode_blocks(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes,
                          float* absmax) {
  const Bins bins = bins_of(midpoints);
  for (int64_t block = 0; block < blocks; ++block) {
    const T* in = static_cast<const T*>(weight) + block * kBlock;
    __m512 values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = load(in + i * kLanes);
    absmax[block] = largest_magnitude(values);
    const __m512 reciprocal = reciprocal_of(absmax[block]);
    __m512i code[kVectors];
    for (int i = 0; i < kVectors; ++i) code[i] = encode(_mm512_mul_ps(values[i], reciprocal), bins);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + block * kBlockBytes), pack(code));
  }
}

// Pairs of bf16 as they lie in 32 bits: without their sign bits they order as 16-bit integers do.
AVX512 inline float largest_magnitude(__m512i first, __m512i second) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  const __m512i of_both = _mm512_max_epu16(_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(of_both), _mm512_extracti64x4_epi64(of_both, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // the one horizontal instruction there is finds a least value
  const __m128i inverted = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return float_of(static_cast<uint32_t>(~_mm_cvtsi128_si32(inverted) & 0xFFFF) << 16);
}

// bf16 spares the conversion, and pairs need not be brought back into order.
template <>
AVX512 void encode_blocks<BFloat16>(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes,
                                    float* absmax) {
  const Bins bins = bins_of(midpoints);
  const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
  for (int64_t block = 0; block < blocks; ++block) {
    const BFloat16* in = static_cast<const BFloat16*>(weight) + block * kBlock;
    const __m512i pairs[2] = {_mm512_loadu_si512(in), _mm512_loadu_si512(in + 2 * kLanes)};
    absmax[block] = largest_magnitude(pairs[0], pairs[1]);
    const __m512 reciprocal = reciprocal_of(absmax[block]);
    for (int i = 0; i < 2; ++i) {
      const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
      const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper));
      const __m512i first_code = encode(_mm512_mul_ps(first, reciprocal), bins);
      const __m512i second_code = encode(_mm512_mul_ps(second, reciprocal), bins);
      const __m512i byte = _mm512_or_si512(_mm512_slli_epi32(first_code, 4), second_code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + block * kBlockBytes + i * kLanes), _mm512_cvtepi32_epi8(byte));
    }
  }
}

AVX512 inline __m256i round_values(__m512 values, BFloat16) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

AVX512 inline __m256i round_values(__m512 values, Float16) {
  return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

template <typename T>
AVX512 inline void decode_block(const uint8_t* codes, __m512 values, T* out) {
  // the 16 values twice, so that bit 4 of an index, left over from the other code, changes nothing
  const __m512i table = _mm512_broadcast_i64x4(round_values(values, T{}));
  for (int i = 0; i < kBlockBytes; i += 16) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, table));
  }
}

AVX512 inline void decode_block(const uint8_t* codes, __m512 values, float* out) {
  for (int i = 0; i < kBlockBytes; i += 8) {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(index, values));
  }
}

template <typename T>
AVX512 void decode_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, const float* codebook, void* out) {
  const __m512 value = _mm512_loadu_ps(codebook);
  for (int64_t block = 0; block < blocks; ++block)
    decode_block(codes + block * kBlockBytes, _mm512_mul_ps(value, _mm512_set1_ps(absmax[block])),
                 static_cast<T*>(out) + block * kBlock);
}

}  // namespace

const NF4Kernels kAvx512Kernels = {
    {encode_blocks<float>, encode_blocks<BFloat16>, encode_blocks<Float16>},
    {decode_blocks<float>, decode_blocks<BFloat16>, decode_blocks<Float16>},
};

}  // namespace qsharded
#endif
