// Small symmetric tridiagonal matrices T, one per start vector of a Lanczos iteration: their largest eigenpair, and the
// root of the Krylov certificate. Both use the pivots of tI - T, which are positive for t right of every eigenvalue.
// Solving with them adds positive terms only, because off-diagonals are not negative, so nothing cancels.
//
// A matrix of k steps takes 2 k divisions per evaluation, each of which needs the one before; eight matrices are
// handled side by side. All numbers are first scaled to magnitude 1 by a power of two.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/api.h"

namespace fastlip::cpu {
namespace {

constexpr int kLanes = 8;
constexpr double kEps = std::numeric_limits<double>::epsilon(), kInfinity = std::numeric_limits<double>::infinity();
constexpr double kTiny = 1e-100;  // stands for an eigenvalue 0
constexpr int kRescale = 16;      // pivots multiplied before the logarithm of their product is taken

struct Lanes {
  double at[kLanes];
  double& operator[](int lane) { return at[lane]; }
  double operator[](int lane) const { return at[lane]; }
};

template <typename Body>
inline void each(Body body) {
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) body(lane);
}

// Up to eight matrices, and scratch of their size.
class Group {
 public:
  explicit Group(int64_t steps)
      : steps_(steps), diagonal_(steps), off_(steps), square_(steps), pivot_(steps), y_(steps) {}

  // Lanes beyond `count` repeat the first.
  void load(const Tridiagonal& t, int64_t first, int count) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double* diagonal = t.diagonal + (first + (lane < count ? lane : 0)) * steps_;
      const double* off = t.off + (first + (lane < count ? lane : 0)) * steps_;
      double bound = 0;
      for (int64_t i = 0; i < steps_; ++i) {
        const double row = diagonal[i] + (i > 0 ? off[i - 1] : 0) + (i + 1 < steps_ ? off[i] : 0);
        bound = std::max(bound, row);
      }
      exponent[lane] = bound > 0 && bound < kInfinity ? std::ilogb(bound) : 0;
      for (int64_t i = 0; i < steps_; ++i) {
        diagonal_[i][lane] = std::scalbn(diagonal[i], -exponent[lane]);
        off_[i][lane] = std::scalbn(off[i], -exponent[lane]);
        square_[i][lane] = off_[i][lane] * off_[i][lane];
      }
      rows_[lane] = std::scalbn(bound, -exponent[lane]) * (1 + 8 * kEps);
    }
    find_top();
  }

  int exponent[kLanes];  // the matrix's numbers were divided by 2^exponent
  Lanes top;             // the largest eigenvalue up to rounding, where the pivots are positive

  bool zero(int lane) const { return rows_[lane] == 0; }

  // Pivots of tI - T from the first row on, and whether all of them are positive.
  void factorise(const Lanes& t, bool (&positive)[kLanes]) {
    Lanes least;
    each([&](int lane) { least[lane] = pivot_[0][lane] = t[lane] - diagonal_[0][lane]; });
    for (int64_t i = 1; i < steps_; ++i) {
      each([&](int lane) {
        const double pivot = t[lane] - diagonal_[i][lane] - square_[i - 1][lane] / pivot_[i - 1][lane];
        pivot_[i][lane] = pivot;
        least[lane] = least[lane] <= pivot ? least[lane] : pivot;
      });
    }
    for (int lane = 0; lane < kLanes; ++lane) positive[lane] = least[lane] > 0;
  }

  // Logarithm of the determinant of tI - T, from its pivots.
  Lanes log_determinant() const {
    Lanes product, log;
    each([&](int lane) { product[lane] = 1, log[lane] = 0; });
    for (int64_t i = 0; i < steps_; ++i) {
      each([&](int lane) { product[lane] *= pivot_[i][lane]; });
      if (i % kRescale == kRescale - 1 || i == steps_ - 1) {
        for (int lane = 0; lane < kLanes; ++lane) log[lane] += std::log(product[lane]), product[lane] = 1;
      }
    }
    return log;
  }

  // y = (tI - T)^-1 y with the pivots at t; y not negative. Returns its norm.
  Lanes solve() {
    for (int64_t i = 1; i < steps_; ++i)
      each([&](int lane) { y_[i][lane] += off_[i - 1][lane] / pivot_[i - 1][lane] * y_[i - 1][lane]; });
    Lanes squares;
    each([&](int lane) {
      y_[steps_ - 1][lane] /= pivot_[steps_ - 1][lane];
      squares[lane] = y_[steps_ - 1][lane] * y_[steps_ - 1][lane];
    });
    for (int64_t i = steps_ - 2; i >= 0; --i) {
      each([&](int lane) {
        y_[i][lane] = (y_[i][lane] + off_[i][lane] * y_[i + 1][lane]) / pivot_[i][lane];
        squares[lane] += y_[i][lane] * y_[i][lane];
      });
    }
    each([&](int lane) { squares[lane] = std::sqrt(squares[lane]); });
    return squares;
  }

  void unit_vector() {
    for (int64_t i = 0; i < steps_; ++i) each([&](int lane) { y_[i][lane] = i == 0; });
  }

  // Unit eigenvectors of the largest eigenvalues, [steps] of a lane with the given stride.
  void top_vectors(double* vectors, int count) {
    bool positive[kLanes];
    factorise(top, positive);
    for (int64_t i = 0; i < steps_; ++i) each([&](int lane) { y_[i][lane] = 1; });
    for (int round = 0; round < 3; ++round) {
      const Lanes norm = solve();
      for (int64_t i = 0; i < steps_; ++i) each([&](int lane) { y_[i][lane] /= norm[lane]; });
    }
    for (int lane = 0; lane < count; ++lane) {
      for (int64_t i = 0; i < steps_; ++i) vectors[lane * steps_ + i] = y_[i][lane];
    }
  }

 private:
  // Laguerre's iteration from the right: with real roots it does not pass the largest one, and it converges cubically.
  void find_top() {
    const double k = static_cast<double>(steps_);
    bool done[kLanes], positive[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      done[lane] = zero(lane);
      top[lane] = done[lane] ? kTiny : rows_[lane];
    }
    for (int round = 0; round < 40 && !std::all_of(done, done + kLanes, [](bool d) { return d; }); ++round) {
      factorise(top, positive);
      // p'/p and -(p'/p)' for the characteristic polynomial p: sums over the pivots d of r = d'/d and of -r'.
      Lanes r, s, first, second;
      each([&](int lane) {
        first[lane] = r[lane] = 1 / pivot_[0][lane];
        s[lane] = -r[lane] * r[lane];
        second[lane] = -s[lane];
      });
      for (int64_t i = 1; i < steps_; ++i) {
        each([&](int lane) {
          const double inverse = 1 / pivot_[i][lane], q = square_[i - 1][lane] / pivot_[i - 1][lane];
          const double slope = (1 + q * r[lane]) * inverse, bend = q * (s[lane] - r[lane] * r[lane]) * inverse;
          r[lane] = slope;
          s[lane] = bend - slope * slope;
          first[lane] += r[lane];
          second[lane] -= s[lane];
        });
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        if (done[lane]) continue;
        const double rest = std::max(0.0, (k - 1) * (k * second[lane] - first[lane] * first[lane]));
        const double step = k / (first[lane] + std::sqrt(rest));
        done[lane] = !positive[lane] || !(step > 4 * kEps * top[lane]);
        if (!done[lane]) top[lane] -= step;
      }
    }
    // Rounding may have led past the root. Move back a little, twice as far each time, until all pivots are positive.
    for (double back = 4 * kEps; back < 1; back *= 2) {
      factorise(top, positive);
      if (std::all_of(positive, positive + kLanes, [](bool p) { return p; })) return;
      for (int lane = 0; lane < kLanes; ++lane)
        if (!positive[lane]) top[lane] *= 1 + back;
    }
  }

  int64_t steps_;
  std::vector<Lanes> diagonal_, off_, square_, pivot_, y_;
  Lanes rows_;  // Gershgorin's bound
};

// The certificate's left side over its right side, a decreasing function of u with t = top + exp(u).
class Equation {
 public:
  Equation(Group& group, const KrylovBound& p, int64_t first, int count) : group_(group) {
    const int64_t steps = p.matrix.steps;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t matrix = first + (lane < count ? lane : 0);
      double log = std::log(p.last[matrix]);
      for (int64_t i = 0; i < steps; ++i)
        log += std::log(std::scalbn(p.matrix.off[matrix * steps + i], -exponent(lane)));
      log_product_[lane] = log;
      residual_[lane] = std::scalbn(p.residual[matrix], -exponent(lane));
      overlap_[lane] = p.start_overlap[matrix];
    }
    steps_ = static_cast<double>(steps);
  }

  // A u right of the root, as close to it as `tolerance` times t; not finite where there is none. Regula falsi with
  // Illinois' weights, and a halving every third time, lest one end stay where it is.
  Lanes root(double tolerance) {
    Lanes low, high, low_value, high_value, middle;
    bool done[kLanes];
    int last_side[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = std::log(group_.top[lane] * 1e-12);
      high[lane] = far(lane);
    }
    low_value = value(low);
    // By the formula it holds at `far`; that it does is computed all the same.
    for (int round = 0; round < 8; ++round) {
      high_value = value(high);
      bool all = true;
      for (int lane = 0; lane < kLanes; ++lane) all = all && high_value[lane] <= 0;
      if (all) break;
      for (int lane = 0; lane < kLanes; ++lane)
        if (!(high_value[lane] <= 0)) high[lane] += 4;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      done[lane] = low_value[lane] <= 0 || !(high_value[lane] <= 0);
      if (done[lane]) high[lane] = low_value[lane] <= 0 ? low[lane] : kInfinity;
    }
    for (int round = 0; round < 120; ++round) {
      bool all = true;
      for (int lane = 0; lane < kLanes; ++lane) {
        const double right = std::exp(high[lane]);
        done[lane] = done[lane] || right - std::exp(low[lane]) <= tolerance * (group_.top[lane] + right);
        all = all && done[lane];
        const double share = low_value[lane] / (low_value[lane] - high_value[lane]);
        const bool secant = round % 3 != 2 && share > 0 && share < 1;  // not where a value is infinite
        middle[lane] = done[lane] ? high[lane] : low[lane] + (secant ? share : 0.5) * (high[lane] - low[lane]);
      }
      if (all) break;
      const Lanes at = value(middle);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (done[lane]) continue;
        const int side = at[lane] <= 0 ? 1 : -1;
        (side > 0 ? high : low)[lane] = middle[lane];
        (side > 0 ? high_value : low_value)[lane] = at[lane];
        if (side == last_side[lane]) (side > 0 ? low_value : high_value)[lane] /= 2;
        last_side[lane] = side;
      }
    }
    return high;
  }

  // Upper bound on sigma_1, unscaled.
  double sigma(int lane, double u) const {
    return std::sqrt(std::scalbn(group_.top[lane] + std::exp(u), exponent(lane))) * (1 + 1e-12);
  }

 private:
  int exponent(int lane) const { return group_.exponent[lane]; }

  // The pivots are those of T perturbed by rounding, of t at most: a part of F.
  double residual(int lane, double t) const { return 1.01 * (residual_[lane] + 8 * steps_ * kEps * t); }

  // A u where both terms are below half of the overlap.
  double far(int lane) const {
    const double tail = (log_product_[lane] + std::log(2 / overlap_[lane])) / steps_;
    const double rounding = std::log(2 * residual(lane, group_.top[lane]) / overlap_[lane]);
    return std::max({tail, rounding, std::log(group_.top[lane])}) + 3;
  }

  // Logarithm of left over right; infinite where that is undefined.
  Lanes value(const Lanes& u) {
    Lanes t, out;
    bool positive[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) t[lane] = group_.top[lane] + std::exp(u[lane]);
    group_.factorise(t, positive);
    const Lanes log = group_.log_determinant();
    group_.unit_vector();
    const Lanes inverse = group_.solve();
    for (int lane = 0; lane < kLanes; ++lane) {
      // Products of k factors, and logarithms of hundreds.
      const double tail = std::exp(log_product_[lane] - log[lane]) * (1 + (64 + 4 * steps_) * kEps);
      const double left = tail + residual(lane, t[lane]) * inverse[lane];
      out[lane] = positive[lane] && left >= 0 ? std::log(left / overlap_[lane]) : kInfinity;
    }
    return out;
  }

  Group& group_;
  Lanes log_product_, residual_, overlap_;
  double steps_;
};

}  // namespace

void top_eigenpairs(const Tridiagonal& t, double* values, double* vectors, int64_t begin, int64_t end) {
  Group group(t.steps);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
    group.load(t, first, count);
    group.top_vectors(vectors + first * t.steps, count);
    for (int lane = 0; lane < count; ++lane)
      values[first + lane] = group.zero(lane) ? 0 : std::scalbn(group.top[lane], group.exponent[lane]);
  }
}

void krylov_bound(const KrylovBound& p, int64_t begin, int64_t end) {
  Group group(p.matrix.steps);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
    group.load(p.matrix, first, count);
    Equation equation(group, p, first, count);
    const Lanes root = equation.root(p.tolerance);
    for (int lane = 0; lane < count; ++lane)
      p.upper[first + lane] = std::isfinite(root[lane]) ? equation.sigma(lane, root[lane]) : kInfinity;
  }
}

}  // namespace fastlip::cpu
