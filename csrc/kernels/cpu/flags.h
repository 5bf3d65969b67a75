// Bytes for values: where a ReLU is active, 1 where it passes the value on, as it does with NaN, and else 0; and
// others.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>  // whose functions are always inlined
#endif

#include "kernels/cpu/vectors.h"

namespace fastlip::cpu {
namespace {

FASTLIP_INLINE inline void store_flags(uint8_t* to, float value) { *to = !(value <= 0); }
// The compiler's own conversions between integers of different widths go by single lanes.
FASTLIP_INLINE inline void store_flags(uint8_t* to, Vector<float> value) {
#if defined(__AVX512F__)
  const __mmask16 active = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(active, 1));
#elif defined(__SSE2__)
#ifdef __AVX2__
  const __m256i active = _mm256_castps_si256(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NLE_UQ));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(active), _mm256_extracti128_si256(active, 1));
#else
  const __m128i active = _mm_castps_si128(_mm_cmpnle_ps(value, _mm_setzero_ps()));
  const __m128i words = _mm_packs_epi32(active, active);
#endif
  const __m128i flags = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
  __builtin_memcpy(to, &flags, kVectorBytes / 4);
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) store_flags(to + i, float{value[i]});
#endif
}

// The value where its flag is not 0, and 0 elsewhere.
FASTLIP_INLINE inline float where_flagged(const uint8_t* flag, float value) { return *flag ? value : 0; }
FASTLIP_INLINE inline Vector<float> where_flagged(const uint8_t* flags, Vector<float> value) {
#if defined(__AVX512F__)
  const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags));
  return _mm512_maskz_mov_ps(_mm_test_epi8_mask(own, own), value);
#elif defined(__SSE2__)
  __m128i own = _mm_setzero_si128();
  __builtin_memcpy(&own, flags, kVectorBytes / 4);
#ifdef __AVX2__
  const __m256i inactive = _mm256_cmpeq_epi32(_mm256_cvtepi8_epi32(own), _mm256_setzero_si256());
  return _mm256_andnot_ps(_mm256_castsi256_ps(inactive), value);
#else
  const __m128i zero = _mm_setzero_si128(), words = _mm_unpacklo_epi16(_mm_unpacklo_epi8(own, zero), zero);
  return _mm_andnot_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(words, zero)), value);
#endif
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) value[i] = where_flagged(flags + i, float{value[i]});
  return value;
#endif
}

// Integers from 0 to 255, as bytes.
FASTLIP_INLINE inline void store_bytes(uint8_t* to, Vector<int32_t> value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)value));
#elif defined(__SSE2__)
#ifdef __AVX2__
  const __m256i own = (__m256i)value;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(own), _mm256_extracti128_si256(own, 1));
#else
  const __m128i words = _mm_packs_epi32((__m128i)value, (__m128i)value);
#endif
  const __m128i bytes = _mm_packus_epi16(words, words);
  __builtin_memcpy(to, &bytes, kVectorBytes / 4);
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) to[i] = static_cast<uint8_t>(value[i]);
#endif
}

// The value where its byte is `wanted`, and 0 elsewhere.
FASTLIP_INLINE inline Vector<float> where_byte(const uint8_t* bytes, uint8_t wanted, Vector<float> value) {
#if defined(__AVX512F__)
  const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(own, _mm_set1_epi8(static_cast<char>(wanted))), value);
#elif defined(__SSE2__)
  __m128i own = _mm_setzero_si128();
  __builtin_memcpy(&own, bytes, kVectorBytes / 4);
  own = _mm_cmpeq_epi8(own, _mm_set1_epi8(static_cast<char>(wanted)));
#ifdef __AVX2__
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(own)), value);
#else
  const __m128i words = _mm_unpacklo_epi8(own, own);
  return _mm_and_ps(_mm_castsi128_ps(_mm_unpacklo_epi16(words, words)), value);
#endif
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) value[i] = bytes[i] == wanted ? value[i] : 0;
  return value;
#endif
}

}  // namespace
}  // namespace fastlip::cpu
