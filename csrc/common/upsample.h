// Resizing a map, one axis at a time, and its transpose. The modes:
//   Bilinear  with align_corners=True
//   Nearest   as torch's "nearest" chooses positions, by a factor in float32
#pragma once

#include <cmath>
#include <cstdint>

#include "division.h"

namespace dyhead {

#define DYHEAD_UPSAMPLE_MODES(X) X(Bilinear) X(Nearest)

#define DYHEAD_UPSAMPLE_MODE(name) k##name,
enum class UpsampleMode : int32_t { DYHEAD_UPSAMPLE_MODES(DYHEAD_UPSAMPLE_MODE) };
#undef DYHEAD_UPSAMPLE_MODE

// The position of `from` that output position i of `to` takes in the mode Nearest; it does not
// decrease with i.
DYHEAD_HD int32_t nearest_position(int32_t i, int32_t from, int32_t to) {
  if (from == to) return i;
  if (to == 2 * static_cast<int64_t>(from)) return i / 2;
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  const int32_t position = static_cast<int32_t>(std::floor(static_cast<float>(i) * scale));
  return position < from - 1 ? position : from - 1;
}

// Output position i of `to` reads positions `first` and `second` of `from` with weights 1 -
// fraction and fraction.
template <class F>
struct Interpolation {
  int32_t first, second;
  F fraction;
};

template <class F>
DYHEAD_HD Interpolation<F> interpolate(int32_t i, int32_t from, int32_t to, UpsampleMode mode) {
  if (mode == UpsampleMode::kNearest) {
    const int32_t position = nearest_position(i, from, to);
    return {position, position, F(0)};
  }
  if (to <= 1 || from <= 1) return {0, 0, F(0)};
  // The position is i (from - 1) / (to - 1). In whole numbers its fraction has no rounding error.
  const int64_t position = static_cast<int64_t>(i) * (from - 1);
  const Division division = divide(position, to - 1);
  const int32_t first = static_cast<int32_t>(division.quotient);
  const F fraction = static_cast<F>(division.remainder) / static_cast<F>(to - 1);
  return {first, first + 1 < from ? first + 1 : first, fraction};
}

// The output positions [begin, end) that read one position of `from`.
template <class F>
struct Readers {
  int32_t begin, end;
  int64_t distance;    // from the position to `begin`, in units of 1 / span; may be negative
  int32_t step, span;  // neighbouring outputs are step / span apart
  F unit;              // 1 / span

  // The weight with which reader i reads the position.
  DYHEAD_HD F weight(int32_t i) const {
    const int64_t d = distance + static_cast<int64_t>(i - begin) * step;
    return static_cast<F>(static_cast<int32_t>(span - (d < 0 ? -d : d))) * unit;
  }
};

// The first output position of `to` that takes position i of `from`, or a later one, in the mode
// Nearest. The quotient is exact up to the rounding of the factor, which the loops make up for.
DYHEAD_HD int32_t first_nearest_reader(int32_t i, int32_t from, int32_t to) {
  if (i >= from) return to;
  int32_t first = static_cast<int32_t>(static_cast<int64_t>(i) * to / from);
  while (first > 0 && nearest_position(first - 1, from, to) >= i) --first;
  while (first < to && nearest_position(first, from, to) < i) ++first;
  return first;
}

// The readers of position i of `from` among the positions of `to`.
template <class F>
DYHEAD_HD Readers<F> readers_of(int32_t i, int32_t from, int32_t to, UpsampleMode mode) {
  if (mode == UpsampleMode::kNearest) {
    return {
        first_nearest_reader(i, from, to), first_nearest_reader(i + 1, from, to), 0, 0, 1, F(1)};
  }
  if (to <= 1 || from <= 1) return {0, i == 0 ? to : 0, 0, 0, 1, F(1)};
  const int32_t step = from - 1, span = to - 1;
  // Output o lies at o step / span and reads the whole numbers on either side, so the readers of i
  // are those in [(i - 1) span / step, (i + 1) span / step).
  const int64_t begin = i == 0 ? 0 : (static_cast<int64_t>(i - 1) * span + step - 1) / step;
  const int64_t end = (static_cast<int64_t>(i + 1) * span + step - 1) / step;
  return {static_cast<int32_t>(begin),
          static_cast<int32_t>(end < to ? end : to),
          begin * step - static_cast<int64_t>(i) * span,
          step,
          span,
          F(1) / static_cast<F>(span)};
}

// The sum of the weights with which all output positions read position p, divided by their number:
// p's weight in the mean of the upsampled axis.
template <class F>
DYHEAD_HD F upsampled_mean_weight(int32_t p, int32_t from, int32_t to, UpsampleMode mode) {
  if (from <= 1 || to <= 1) return p == 0 ? F(1) : F(0);
  if (from == to) return F(1) / static_cast<F>(to);
  const Readers<F> readers = readers_of<F>(p, from, to, mode);
  F sum = F(0);
  for (int32_t i = readers.begin; i < readers.end; ++i) sum += readers.weight(i);
  return sum / static_cast<F>(to);
}

}  // namespace dyhead
