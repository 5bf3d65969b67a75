// The matrix units' instruction on the host, in place of csrc's: the 32 fibers of a warp exchange their operands, and
// each computes what its lane holds of the sums.
//
// Inputs lose the 13 bits that TF32 has not. Sums are cut more coarsely than devices were found to (Fasi et al. 2021):
// of four products and what they are added to, all that lies below float32's last bit of the largest of them goes, then
// the same with the next four.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastlip::cuda {

struct HostWarp {
  uint32_t a[32][4], b[32][2];
  uint64_t call[32];  // which instruction these operands are of
};

inline double host_tf32(uint32_t bits) {
  bits &= ~0x1FFFu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A multiple of a power of two, towards zero.
inline double host_cut(double value, double unit) { return std::trunc(value / unit) * unit; }
inline double host_last_bit(double value) { return std::ldexp(1.0, std::ilogb(value) - 23); }

// Four products added to a sum.
inline float host_add(float sum, const double (&products)[4]) {
  double most = std::fabs(sum);
  for (const double product : products) most = product == product ? std::fmax(most, std::fabs(product)) : NAN;
  if (!std::isfinite(most)) {
    for (const double product : products) sum += static_cast<float>(product);
    return sum;
  }
  if (most == 0) return 0;
  const double last = host_last_bit(most);
  double total = host_cut(sum, last);
  for (const double product : products) total += host_cut(product, last);
  return total == 0 ? 0.0f : static_cast<float>(host_cut(total, host_last_bit(total)));
}

inline void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static HostWarp warps[2][Fibers::kMost / 32];  // in turn: others may still read the operands before
  const unsigned lane = threadIdx.x % 32;
  const uint64_t call = Fibers::next_call();
  HostWarp& warp = warps[call % 2][threadIdx.x / 32];
  std::memcpy(warp.a[lane], a, sizeof(a));
  std::memcpy(warp.b[lane], b, sizeof(b));
  warp.call[lane] = call;
  Fibers::warp_barrier();
  for (const uint64_t other : warp.call) {
    if (other != call) host_abort("lanes of a warp are at different instructions");
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int half = 0; half < 2; ++half) {
      double products[4];
      for (int k = 0; k < 4; ++k)
        products[k] = host_tf32(warp.a[row % 8 * 4 + k][row / 8 + half * 2]) * host_tf32(warp.b[column * 4 + k][half]);
      sums[i] = host_add(sums[i], products);
    }
  }
}

}  // namespace fastlip::cuda
