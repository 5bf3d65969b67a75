// Random starts. Once per attack and bound by log and sine, so compiled for the baseline alone.
//
// Compiled without contraction (-ffp-contract=off): Linf starts are the same bit for bit on every backend.
#include <cmath>

#include "kernels/cpu/scalar.h"

namespace fastlip::cpu {
namespace {

struct Words {
  uint32_t w[4];
};
// Philox4x32-10 (Salmon et al., SC 2011).
inline Words philox(int64_t key, uint32_t block, uint32_t tag, int64_t id) {
  uint32_t c0 = block, c1 = tag, c2 = static_cast<uint32_t>(id), c3 = static_cast<uint32_t>(id >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}
constexpr uint32_t kElements = 0, kSample = 1;  // second counter word

// Uniform integers of the arithmetic's precision: a word each for float, two for double.
template <typename T>
struct Draw;
template <>
struct Draw<float> {
  static constexpr int kLanes = 4;
  static constexpr float kUlp = 0x1p-24f;
  static int64_t integer(const Words& w, int lane) { return w.w[lane] >> 8; }
  static bool sign(const Words& w, int lane) { return w.w[lane] & 1; }
};
template <>
struct Draw<double> {
  static constexpr int kLanes = 2;
  static constexpr double kUlp = 0x1p-53;
  static int64_t integer(const Words& w, int lane) {
    return static_cast<int64_t>((static_cast<uint64_t>(w.w[2 * lane] >> 5) << 26) | (w.w[2 * lane + 1] >> 6));
  }
  static bool sign(const Words& w, int lane) { return w.w[2 * lane + 1] & 1; }
};
template <typename T>
inline T open_unit(int64_t integer) {  // (0, 1]
  return (static_cast<T>(integer) + T(0.5)) * Draw<T>::kUlp;
}

template <typename T>
void linf_unit(T* out, const Words& w) {
  constexpr int64_t half = static_cast<int64_t>(0.5 / Draw<T>::kUlp);
  for (int i = 0; i < Draw<T>::kLanes; ++i)
    out[i] = static_cast<T>(Draw<T>::integer(w, i) - half) * (2 * Draw<T>::kUlp);
}
// Box-Muller on pairs of draws.
template <typename T>
void normals(T* out, const Words& w) {
  constexpr int lanes = Draw<T>::kLanes;
  for (int i = 0; i < lanes; i += 2) {
    const double length = std::sqrt(-2 * std::log(static_cast<double>(open_unit<T>(Draw<T>::integer(w, i)))));
    const double angle = static_cast<double>(Draw<T>::integer(w, i + 1)) * (Draw<T>::kUlp * 6.283185307179586);
    out[i] = static_cast<T>(length * std::cos(angle));
    out[i + 1] = static_cast<T>(length * std::sin(angle));
  }
}
template <typename T>
void signed_exponentials(T* out, const Words& w) {
  for (int i = 0; i < Draw<T>::kLanes; ++i) {
    const T size = static_cast<T>(-std::log(static_cast<double>(open_unit<T>(Draw<T>::integer(w, i)))));
    out[i] = Draw<T>::sign(w, i) ? -size : size;
  }
}

// Fills unit with a point of the unit ball, up to `scale`, which is returned.
template <typename T>
T unit_ball(T* unit, const RandomStart& p, int64_t id) {
  constexpr int lanes = Draw<T>::kLanes;
  const int64_t key = *p.key;
  for (int64_t e = 0; e < p.size; e += lanes) {  // writes up to lanes - 1 past size: scratch has room
    const Words w = philox(key, static_cast<uint32_t>(e / lanes), kElements, id);
    p.norm == Norm::linf ? linf_unit(unit + e, w)
    : p.norm == Norm::l2 ? normals(unit + e, w)
                         : signed_exponentials(unit + e, w);
  }
  if (p.norm == Norm::linf) return 1;
  const double once = open_unit<T>(Draw<T>::integer(philox(key, 0, kSample, id), 0));
  double sum = 0;
  if (p.norm == Norm::l2) {
    for (int64_t e = 0; e < p.size; ++e) sum += static_cast<double>(unit[e]) * static_cast<double>(unit[e]);
    const double length = std::sqrt(sum);
    return length > 0 ? static_cast<T>(std::pow(once, 1.0 / static_cast<double>(p.size)) / length) : T(0);
  }
  for (int64_t e = 0; e < p.size; ++e) sum += std::fabs(static_cast<double>(unit[e]));
  return static_cast<T>(1 / (sum - std::log(once)));
}

template <typename S>
void start_as(const RandomStart& p, int64_t begin, int64_t end, void* scratch) {
  using T = Arithmetic<S>;
  T* unit = static_cast<T*>(scratch);
  const int64_t plane = p.size / p.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    S* out = static_cast<S*>(p.out) + sample * p.out_stride;
    const S* x0 = static_cast<const S*>(p.x0) + sample * p.x0_stride;
    const T eps = finite_or_zero(radius<T>(p.eps, sample));
    const T length = eps * unit_ball(unit, p, p.ids[sample]);
    const Limit<T> lo(p.lo, sample), hi(p.hi, sample);
    for (int64_t e = 0; e < p.size; ++e) {
      const int64_t i = p.channels == 1 ? e : (e % plane) * p.channels + e / plane;
      T centre;
      if constexpr (is_wide<S>) {
        centre = x0[i];
      } else {
        centre = widen(x0[i]);
      }
      const T v = clip(centre + length * unit[e], lo.row ? lo.row[i] : lo.scalar, hi.row ? hi.row[i] : hi.scalar);
      if constexpr (is_wide<S>) {
        out[i] = v;
      } else {
        narrow(out[i], v, centre);
      }
    }
  }
}

}  // namespace

void random_start(const RandomStart& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.dtype) {
    case DType::f32:
      return start_as<float>(p, begin, end, scratch);
    case DType::f64:
      return start_as<double>(p, begin, end, scratch);
    case DType::f16:
      return start_as<Half>(p, begin, end, scratch);
    case DType::bf16:
      return start_as<BFloat16>(p, begin, end, scratch);
  }
}

}  // namespace fastlip::cpu
