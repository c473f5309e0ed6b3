// bf16 and fp16 as plain 16-bit structs, converted as PyTorch does: exact upwards, nearest-even downwards.
#pragma once

#include <cstdint>
#include <cstring>

namespace qsharded {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | magnitude << 13);  // infinity, NaN
  if (magnitude < 0x0400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal
  return float_of(sign | ((magnitude << 13) + (112u << 23)));  // 112: the exponents' biases, 127 - 15
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Finite values and infinity; a NaN may lose its payload or become infinite.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and above
    half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {
    // below 2^-14: beside 0.5 a float's last bit is 2^-24, the step of fp16's subnormals, so the addition rounds
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace qsharded
