// Random numbers that are a function of a key, a sample's id and an element. Free of threads and memory, like
// arithmetic.h.
#pragma once
#include "kernels/cuda/arithmetic.h"

namespace fastlip::cuda {

struct Words {
  uint32_t at[4];
};

FASTLIP_EITHER void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Philox4x32-10 (Salmon et al., SC 2011), counter (block, tag, id).
FASTLIP_EITHER Words philox(uint64_t key, uint64_t block, uint32_t tag, uint64_t id) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = tag;
  uint32_t c2 = static_cast<uint32_t>(id), c3 = static_cast<uint32_t>(id >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr uint32_t kElements = 0, kSample = 1;  // tags: the elements of a sample, its one further number

// How a block of four words becomes numbers: four of 24 bits, or two of 53 for double.
template <typename T>
struct Draw {
  static constexpr bool kWide = std::is_same_v<T, double>;
  static constexpr int kLanes = kWide ? 2 : 4, kBits = kWide ? 53 : 24;
  static constexpr double kUnit = kWide ? 0x1p-53 : 0x1p-24;

  FASTLIP_EITHER static int64_t integer(const Words& words, int lane) {
    if constexpr (kWide) {
      return (static_cast<int64_t>(words.at[2 * lane] >> 5) << 26) | (words.at[2 * lane + 1] >> 6);
    } else {
      return words.at[lane] >> 8;
    }
  }
  // In [-1, 1), exact.
  FASTLIP_EITHER static T symmetric(int64_t integer) {
    return static_cast<T>(integer - (int64_t{1} << (kBits - 1))) * static_cast<T>(2 * kUnit);
  }
  // -log((integer + 1/2) 2^-bits): the argument is exact on either side of 1/2, taken as its distance from 1 above.
  FASTLIP_EITHER static T exponential(int64_t integer) {
    constexpr int64_t kWhole = int64_t{1} << kBits;
    if (integer < kWhole / 2) return -log((static_cast<T>(integer) + T(0.5)) * static_cast<T>(kUnit));
    return -log1p(-(static_cast<T>(kWhole - 1 - integer) + T(0.5)) * static_cast<T>(kUnit));
  }
  FASTLIP_EITHER static T sign(const Words& words, int lane) {
    return words.at[kWide ? 2 * lane + 1 : lane] & 1 ? T(-1) : T(1);
  }
  // Box-Muller: two independent Gaussians.
  FASTLIP_EITHER static void gaussians(int64_t first, int64_t second, T (&out)[2]) {
    const T length = sqrt(2 * exponential(first)), turns = static_cast<T>(second) * static_cast<T>(2 * kUnit);
    T sine, cosine;
#ifdef __CUDA_ARCH__
    if constexpr (kWide) {
      sincospi(turns, &sine, &cosine);
    } else {
      sincospif(turns, &sine, &cosine);
    }
#else
    sine = static_cast<T>(sin(M_PI * static_cast<double>(turns)));
    cosine = static_cast<T>(cos(M_PI * static_cast<double>(turns)));
#endif
    out[0] = length * cosine;
    out[1] = length * sine;
  }
};

// The numbers of one block before scaling: uniform (linf), Gaussian (l2), exponential with a sign (l1).
template <typename T, Norm kNorm>
FASTLIP_EITHER void draw_block(uint64_t key, uint64_t id, uint64_t block, T (&out)[Draw<T>::kLanes]) {
  using D = Draw<T>;
  const Words words = philox(key, block, kElements, id);
  if constexpr (kNorm == Norm::l2) {
    for (int lane = 0; lane < D::kLanes; lane += 2) {
      T pair[2];
      D::gaussians(D::integer(words, lane), D::integer(words, lane + 1), pair);
      out[lane] = pair[0];
      out[lane + 1] = pair[1];
    }
  } else {
    for (int lane = 0; lane < D::kLanes; ++lane) {
      const int64_t integer = D::integer(words, lane);
      out[lane] = kNorm == Norm::linf ? D::symmetric(integer) : D::exponential(integer) * D::sign(words, lane);
    }
  }
}

// What the numbers of a sample are multiplied by to be uniform in the unit ball: `sum` is that of their squares (l2),
// of their magnitudes (l1).
template <typename T, Norm kNorm>
FASTLIP_EITHER double ball_scale(uint64_t key, uint64_t id, double sum, int64_t size) {
  using D = Draw<T>;
  const double u = (static_cast<double>(D::integer(philox(key, 0, kSample, id), 0)) + 0.5) * D::kUnit;
  if (kNorm == Norm::l2) return sum > 0 ? pow(u, 1.0 / static_cast<double>(size)) / sqrt(sum) : 0;
  return 1 / (sum - log(u));
}

// Where the logical (row-major) element stands in a sample laid out channels_last; contiguous where channels is 1.
FASTLIP_EITHER int64_t position(int64_t element, int64_t channels, int64_t plane) {
  return channels == 1 ? element : element % plane * channels + element / plane;
}

}  // namespace fastlip::cuda
