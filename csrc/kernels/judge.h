// What judge says of one sample: its largest logits as they come, then its loss and decision, then whether it is the
// best so far. One copy for CPU and CUDA, of internal linkage (see cpu/scalar.h).
// The rules stand in fastlip/ops/_judge.py and, as code, in fastlip/ops/_reference_judge.py.
#pragma once
#include "kernels/api.h"
#include "kernels/either.h"

namespace fastlip {
namespace {

constexpr int32_t kNoClass = INT32_MAX;

template <typename T>
constexpr T kInfinite = static_cast<T>(__builtin_huge_val());

// The four largest of the logits seen, from the largest down, and their classes; of equal ones the lower class comes
// first. A logit of -inf is a class that the model excludes, and is not among them.
template <typename T>
struct Ranking {
  static constexpr int kPlaces = 4;

  T top[kPlaces];
  int32_t at[kPlaces];
  T least;  // of the logits that are not -inf
  bool nan;

  FASTLIP_EITHER static Ranking empty() {
    Ranking r;
    for (int place = 0; place < kPlaces; ++place) {
      r.top[place] = -kInfinite<T>;
      r.at[place] = kNoClass;
    }
    r.least = kInfinite<T>;
    r.nan = false;
    return r;
  }
  // Of a class above all that were seen.
  FASTLIP_EITHER void append(T logit, int32_t c) {
    if (!(logit > top[kPlaces - 1])) return;
    int place = kPlaces - 1;
    for (; place > 0 && logit > top[place - 1]; --place) {
      top[place] = top[place - 1];
      at[place] = at[place - 1];
    }
    top[place] = logit;
    at[place] = c;
  }
  // In any order; of a logit that is not -inf, or of an empty place. Branches are few, because lanes diverge.
  FASTLIP_EITHER void insert(T logit, int32_t c) {
    if (!ahead(logit, c, kPlaces - 1)) return;
    for (int place = kPlaces - 1; place >= 0; --place) {
      const bool moves = place > 0 && ahead(logit, c, place - 1), here = ahead(logit, c, place);
      top[place] = moves ? top[place - 1] : here ? logit : top[place];
      at[place] = moves ? at[place - 1] : here ? c : at[place];
    }
  }
  FASTLIP_EITHER void merge(const Ranking& other) {
    for (int place = 0; place < kPlaces; ++place) insert(other.top[place], other.at[place]);
    least = other.least < least ? other.least : least;
    nan |= other.nan;
  }
  // Of a logit that needs no place.
  FASTLIP_EITHER void note(T logit) {
    nan |= logit != logit;
    if (logit > -kInfinite<T> && logit < least) least = logit;
  }

 private:
  FASTLIP_EITHER bool ahead(T logit, int32_t c, int place) const {
    return logit > top[place] || (logit == top[place] && c < at[place]);
  }
};

// The classes that a sample's loss is about; kNoClass for those that the model does not have.
struct Classes {
  int32_t own, toward;
  bool known;

  FASTLIP_EITHER Classes(const Judge& j, int64_t sample)
      : own(of(j, j.targets ? j.targets[sample] : j.labels[sample])),
        toward(j.toward ? of(j, j.toward[sample]) : kNoClass),
        known(own != kNoClass && (!j.toward || toward != kNoClass)) {}

 private:
  FASTLIP_EITHER static int32_t of(const Judge& j, int64_t c) {
    return c >= 0 && c < j.classes ? static_cast<int32_t>(c) : kNoClass;
  }
};

// Margin or DLR, and its gradient, in double. DLR is the margin over the spread of the largest logits.
struct Margin {
  int32_t up, down;  // the loss increases with the logit of one class, and decreases with that of the other
  // The spread increases with the logit of one class, and decreases with those of one or two others; -1: none.
  int32_t top = -1, below = -1, below_too = -1;
  double loss, share = 0, spread = 1;

  template <typename T>
  FASTLIP_EITHER Margin(const Judge& j, const Ranking<T>& r, const Classes& classes, const T* logits)
      : up(classes.toward), down(classes.own) {
    if (!j.toward) {
      up = r.at[0] != down ? r.at[0] : r.at[1];
      if (up == kNoClass) up = down == 0;  // the model excludes all other classes
    }
    if (j.targets) {
      down = up;
      up = classes.own;
    }
    loss = static_cast<double>(logits[up]) - static_cast<double>(logits[down]);
    // With targets DLR would also increase by widening the spread while the target stays far from the top.
    const T last = j.toward ? r.top[3] : r.top[2];
    if (j.kind != Loss::dlr || j.targets || !(last > -kInfinite<T>)) return;
    const double third = static_cast<double>(r.top[2]), fourth = static_cast<double>(r.top[3]);
    const double width = static_cast<double>(r.top[0]) - (j.toward ? (third + fourth) / 2 : third);
    if (!(width > 0)) return;
    loss /= width;
    share = loss;
    spread = width;
    top = r.at[0];
    below = r.at[2];
    if (j.toward) below_too = r.at[3];
  }
  FASTLIP_EITHER bool mentions(int32_t c) const {
    return c == up || c == down || c == top || c == below || c == below_too;
  }
  // With respect to the logit of a class; kNoClass is one that the loss does not mention.
  FASTLIP_EITHER double grad(int32_t c) const {
    const double pull = static_cast<double>(c == up) - static_cast<double>(c == down);
    const double low = static_cast<double>(c == below || c == below_too);
    const double widening = static_cast<double>(c == top) - (below_too < 0 ? low : low / 2);
    return (pull - share * widening) / spread;
  }
};

// Whether a sample is adversarial, whether its decision is in doubt, and whether it is the best so far.
struct Decision {
  bool adversarial, doubtful, better;

  // `value`: the loss as it is returned; `known`: logits without a NaN, and classes of the model.
  template <typename T>
  FASTLIP_EITHER Decision(const Judge& j, const Ranking<T>& r, const Classes& classes, bool known, T value,
                          int64_t sample) {
    const int32_t decision = r.at[0] == kNoClass ? 0 : r.at[0];
    adversarial = known && (decision == classes.own) == (j.targets != nullptr);
    const double lead = static_cast<double>(r.top[0]) - static_cast<double>(r.top[1]);
    const double width = static_cast<double>(r.top[0]) - static_cast<double>(r.least);
    doubtful = r.nan || !(lead > 2 * j.rounding * width);
    better = true;
    if (!j.best_loss) return;
    const double loss = value == value ? static_cast<double>(value) : -kInfinite<double>;
    const bool succeeded = j.succeeded[sample] != 0, larger = loss > j.best_loss[sample];
    better = succeeded ? !j.early_stop && adversarial && larger : adversarial || larger;
    j.succeeded[sample] = succeeded || adversarial;
    if (!better) return;
    j.best_loss[sample] = loss;
    if (j.unconfirmed) j.unconfirmed[sample] = adversarial;
    if (j.best_doubtful) j.best_doubtful[sample] = doubtful;
  }
  template <typename T>
  FASTLIP_EITHER void write(const Judge& j, int64_t sample, T value) const {
    static_cast<T*>(j.loss)[sample] = value;
    j.adversarial[sample] = adversarial;
    j.doubtful[sample] = doubtful;
    j.better[sample] = better;
  }
};

}  // namespace
}  // namespace fastlip
