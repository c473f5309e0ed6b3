// NF4 with AVX-512 (F, BW, VL): 16 levels and 16 thresholds fit one register, so a look-up is one permutation.
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

AVX512 inline __m512 load(const BFloat16* weight) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 inline __m512 load(const Float16* weight) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight)));
}

// Binary search: with the code's higher bits known, entry `code` is the threshold that decides the bit `bit`.
AVX512 inline __m512 thresholds(const float* midpoints, int bit) {
  float entries[kLanes];
  for (int code = 0; code < kLanes; ++code)
    entries[code] = midpoints[code + bit - 1 < kMidpoints ? code + bit - 1 : kMidpoints - 1];
  return _mm512_loadu_ps(entries);
}

struct Thresholds {
  __m512 bit8, bit4, bit2, bit1;
};

AVX512 inline __m512i decide(__m512i code, __m512 value, __m512 threshold, int bit) {
  const __mmask16 above = _mm512_cmp_ps_mask(value, threshold, _CMP_GT_OQ);
  return _mm512_mask_or_epi32(code, above, code, _mm512_set1_epi32(bit));
}

AVX512 inline __m512i encode(__m512 value, const Thresholds& t) {
  __m512i code = decide(_mm512_setzero_si512(), value, t.bit8, 8);
  code = decide(code, value, _mm512_permutexvar_ps(code, t.bit4), 4);
  code = decide(code, value, _mm512_permutexvar_ps(code, t.bit2), 2);
  return decide(code, value, _mm512_permutexvar_ps(code, t.bit1), 1);
}

// Each 64-bit lane holds two codes, the first in its lower half.
AVX512 inline __m128i pack(__m512i code) {
  return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32)));
}

AVX512 inline float largest_magnitude(const __m512* values) {
  // without their sign bits floats order as integers do
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < kVectors; ++i)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude));
  return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
}

template <typename T>
AVX512 void encode_blocks(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes,
                          float* absmax) {
  const Thresholds t = {_mm512_set1_ps(midpoints[7]), thresholds(midpoints, 4), thresholds(midpoints, 2),
                        thresholds(midpoints, 1)};
  for (int64_t block = 0; block < blocks; ++block) {
    const T* in = static_cast<const T*>(weight) + block * kBlock;
    __m512 values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = load(in + i * kLanes);
    absmax[block] = largest_magnitude(values);
    const float divisor = absmax[block] > kSmallestAbsmax ? absmax[block] : kSmallestAbsmax;
    const __m512 reciprocal = _mm512_set1_ps(1.0f / divisor);
    for (int i = 0; i < kVectors; ++i)
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + block * kBlockBytes + i * kLanes / 2),
                       pack(encode(_mm512_mul_ps(values[i], reciprocal), t)));
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
AVX512 void decode_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, const float* levels, void* out) {
  const __m512 level = _mm512_loadu_ps(levels);
  for (int64_t block = 0; block < blocks; ++block)
    decode_block(codes + block * kBlockBytes, _mm512_mul_ps(level, _mm512_set1_ps(absmax[block])),
                 static_cast<T*>(out) + block * kBlock);
}

}  // namespace

const NF4Kernels kAvx512Kernels = {
    {encode_blocks<float>, encode_blocks<BFloat16>, encode_blocks<Float16>},
    {decode_blocks<float>, decode_blocks<BFloat16>, decode_blocks<Float16>},
};

}  // namespace qsharded
#endif
