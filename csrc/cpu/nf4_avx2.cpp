// NF4 with AVX2 and F16C, which every CPU with AVX2 has.
#include "nf4_kernels.h"
#include "scalar_types.h"

#if defined(__x86_64__)
#include <immintrin.h>

// On every function that uses the instructions: the file itself is compiled for any x86-64, and runs only when chosen.
#define AVX2 __attribute__((target("avx2,f16c")))

namespace qsharded {
namespace {

constexpr int kLanes = 8;
constexpr int kVectors = kBlock / kLanes;

AVX2 inline __m256 load(const float* weight) { return _mm256_loadu_ps(weight); }

AVX2 inline __m256 load(const BFloat16* weight) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 inline __m256 load(const Float16* weight) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
}

// Binary search, the code's bits from the highest: with `prefix` its bits so far, entry `prefix` of step `step` is the
// threshold that decides the next. The last step has eight entries, as many as a register.
AVX2 inline __m256 thresholds(const float* midpoints, int step) {
  const int half_span = kCodes >> (step + 1);
  float entries[kLanes];
  for (int prefix = 0; prefix < kLanes; ++prefix)
    entries[prefix] = midpoints[((2 * prefix + 1) * half_span - 1) % kMidpoints];  // % : unused entries, any value
  return _mm256_loadu_ps(entries);
}

struct Thresholds {
  __m256 step[4];
};

AVX2 inline __m256i append_bit(__m256i prefix, __m256 value, __m256 threshold) {
  const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_GT_OQ));  // -1 where so
  return _mm256_sub_epi32(_mm256_add_epi32(prefix, prefix), above);
}

AVX2 inline __m256i encode(__m256 value, const Thresholds& t) {
  __m256i prefix = _mm256_setzero_si256();
  for (const __m256& step : t.step) prefix = append_bit(prefix, value, _mm256_permutevar8x32_ps(step, prefix));
  return prefix;
}

// 32 codes in order, as 32-bit lanes, to 16 bytes.
AVX2 inline __m128i pack(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  // both packs work in 128-bit halves; this puts groups of four codes back into order
  const __m256i codes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // first * 16 + second * 1
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

AVX2 inline float largest_magnitude(const __m256* values) {
  // without their sign bits floats order as integers do
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kVectors; ++i)
    largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
  return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(four)));
}

template <typename T>
AVX2 void encode_blocks(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes, float* absmax) {
  const Thresholds t = {
      {thresholds(midpoints, 0), thresholds(midpoints, 1), thresholds(midpoints, 2), thresholds(midpoints, 3)}};
  for (int64_t block = 0; block < blocks; ++block) {
    const T* in = static_cast<const T*>(weight) + block * kBlock;
    __m256 values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = load(in + i * kLanes);
    absmax[block] = largest_magnitude(values);
    const float divisor = absmax[block] > kSmallestAbsmax ? absmax[block] : kSmallestAbsmax;
    const __m256 reciprocal = _mm256_set1_ps(1.0f / divisor);
    __m256i code[kVectors];
    for (int i = 0; i < kVectors; ++i) code[i] = encode(_mm256_mul_ps(values[i], reciprocal), t);
    __m128i* packed = reinterpret_cast<__m128i*>(codes + block * kBlockBytes);
    _mm_storeu_si128(packed, pack(code[0], code[1], code[2], code[3]));
    _mm_storeu_si128(packed + 1, pack(code[4], code[5], code[6], code[7]));
  }
}

AVX2 inline __m128i round_values(__m256 values, BFloat16) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i rounded = _mm256_srli_epi32(sum, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

AVX2 inline __m128i round_values(__m256 values, Float16) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
}

// The 16 values' low bytes and high bytes: a byte shuffle looks up 16 entries, so each byte is looked up apart.
struct ByteTables {
  __m128i low, high;
};

AVX2 inline ByteTables byte_tables(__m128i words_0_7, __m128i words_8_15) {
  const __m128i low_byte = _mm_set1_epi16(0xFF);
  return {_mm_packus_epi16(_mm_and_si128(words_0_7, low_byte), _mm_and_si128(words_8_15, low_byte)),
          _mm_packus_epi16(_mm_srli_epi16(words_0_7, 8), _mm_srli_epi16(words_8_15, 8))};
}

AVX2 inline void look_up(__m128i codes, const ByteTables& tables, void* out) {
  const __m128i low = _mm_shuffle_epi8(tables.low, codes), high = _mm_shuffle_epi8(tables.high, codes);
  __m128i* next = static_cast<__m128i*>(out);
  _mm_storeu_si128(next, _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(next + 1, _mm_unpackhi_epi8(low, high));
}

template <typename T>
AVX2 inline void decode_block(const uint8_t* codes, __m256 values_0_7, __m256 values_8_15, T* out) {
  const ByteTables tables = byte_tables(round_values(values_0_7, T{}), round_values(values_8_15, T{}));
  const __m128i nibble = _mm_set1_epi8(0x0F);
  for (int i = 0; i < kBlockBytes; i += 16) {
    const __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m128i first = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), second = _mm_and_si128(byte, nibble);
    look_up(_mm_unpacklo_epi8(first, second), tables, out + 2 * i);
    look_up(_mm_unpackhi_epi8(first, second), tables, out + 2 * i + 16);
  }
}

AVX2 inline void decode_block(const uint8_t* codes, __m256 values_0_7, __m256 values_8_15, float* out) {
  for (int i = 0; i < kBlockBytes; i += 4) {
    int32_t four;
    std::memcpy(&four, codes + i, sizeof four);
    const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
    // the permutations read bits 0 to 2 of an index, the blend its sign bit, into which bit 3 is shifted
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(values_0_7, index),
                                                   _mm256_permutevar8x32_ps(values_8_15, index), upper));
  }
}

template <typename T>
AVX2 void decode_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, const float* codebook, void* out) {
  const __m256 values_0_7 = _mm256_loadu_ps(codebook), values_8_15 = _mm256_loadu_ps(codebook + kLanes);
  for (int64_t block = 0; block < blocks; ++block) {
    const __m256 scale = _mm256_set1_ps(absmax[block]);
    decode_block(codes + block * kBlockBytes, _mm256_mul_ps(values_0_7, scale), _mm256_mul_ps(values_8_15, scale),
                 static_cast<T*>(out) + block * kBlock);
  }
}

}  // namespace

const NF4Kernels kAvx2Kernels = {
    {encode_blocks<float>, encode_blocks<BFloat16>, encode_blocks<Float16>},
    {decode_blocks<float>, decode_blocks<BFloat16>, decode_blocks<Float16>},
};

}  // namespace qsharded
#endif
