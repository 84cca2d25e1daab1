// step_ on the CPU.
#include "../operators/step.h"

#include <array>

#include "../math/rounding.h"
#include "strips.h"

namespace unlearn {
namespace {

struct StepLists {
  RawList weights, slow, first, second, forget, retain, bits;
};

// What a word of weights is made of, in the opmath type.
template <typename T>
struct WordPointers {
  T *theta, *first, *second, *slow;
  const T *forget, *retain;
};

// With a constant trip count and lanes that do not alias the compiler turns this loop into full-width vector code.
template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
inline __attribute__((always_inline)) void update_word(
    const WordPointers<T>& p,
    std::uint32_t keep_forget,
    std::uint32_t keep_retain,
    std::uint32_t touch,
    const StepScalars<T>& s) {
  constexpr bool with_first = (forget || retain) && has_first_moment(rule);
  constexpr bool with_second = (forget || retain) && has_second_moment(rule);
  T* __restrict theta = p.theta;
  T* __restrict first = p.first;
  T* __restrict second = p.second;
  T* __restrict slow = p.slow;
  const T* __restrict g_forget = p.forget;
  const T* __restrict g_retain = p.retain;
  UNLEARN_LANES
  for (int i = 0; i < kWordBits; ++i) {
    WeightState<T> w{theta[i], with_first ? first[i] : T(0), with_second ? second[i] : T(0),
                     interpolate ? slow[i] : T(0)};
    w = update_weight<rule, forget, retain, interpolate>(
        w, forget ? g_forget[i] : T(0), retain ? g_retain[i] : T(0), lane_mask<T>(keep_forget, i),
        lane_mask<T>(keep_retain, i), lane_mask<T>(touch, i), s);
    theta[i] = w.theta;
    if constexpr (with_first) first[i] = w.first;
    if constexpr (with_second) second[i] = w.second;
    if constexpr (interpolate) slow[i] = w.slow;
  }
}

// Writes a strip of half-width weights. A weight that may not be touched keeps its stored bits: converting a NaN
// there and back would change its payload.
void store_half(
    const StepLists& lists,
    const StepCall& call,
    size_t t,
    std::int64_t start,
    int n,
    const float* values) {
  std::uint16_t* to = lists.weights.at<std::uint16_t>(t, start);
  if (lists.weights.dtype[t] == ScalarType::BFloat16 && !call.stochastic && !call.protect) {
    UNLEARN_LANES
    for (int i = 0; i < n; ++i) to[i] = float_to_bfloat16(values[i]);
    return;
  }
  std::uint16_t rounded[kStrip];
  if (lists.weights.dtype[t] == ScalarType::Half) {
    float_to_half(values, rounded, n);
  } else if (call.stochastic) {
    const std::uint32_t stream = rounding_stream(call.seed, t);
    for (int i = 0; i < n; ++i) {
      rounded[i] = float_to_bfloat16_stochastic(values[i], rounding_noise(stream, std::uint64_t(start + i)));
    }
  } else {
    for (int i = 0; i < n; ++i) rounded[i] = float_to_bfloat16(values[i]);
  }
  if (call.protect) {
    for (int i = 0; i < n; ++i) {
      const std::uint32_t word = word_at(lists.bits, t, (start + i) / kWordBits);
      if (!((word >> (i % kWordBits)) & 1u)) rounded[i] = to[i];
    }
  }
  std::copy(rounded, rounded + n, to);
}

template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
void update_strip(
    const StepLists& lists,
    const StepCall& call,
    const StepScalars<T>& s,
    size_t t,
    std::int64_t start,
    int n) {
  T theta_buffer[kStrip], forget_buffer[kStrip], retain_buffer[kStrip];
  const bool in_place = lists.weights.dtype[t] == kOpmath<T>;
  if (!in_place) convert_strip(lists.weights, t, start, n, theta_buffer);
  T* theta = in_place ? lists.weights.at<T>(t, start) : theta_buffer;
  T* first = lists.first.empty() ? nullptr : lists.first.at<T>(t, start);
  T* second = lists.second.empty() ? nullptr : lists.second.at<T>(t, start);
  T* slow = interpolate ? lists.slow.at<T>(t, start) : nullptr;
  const T* g_forget = forget ? load_strip(lists.forget, t, start, n, forget_buffer) : nullptr;
  const T* g_retain = retain ? load_strip(lists.retain, t, start, n, retain_buffer) : nullptr;

  const auto update = [&](const WordPointers<T>& p, int offset) {
    const std::uint32_t word = word_at(lists.bits, t, (start + offset) / kWordBits);
    update_word<rule, forget, retain, interpolate>(
        p, word, call.mask_retain ? word : ~0u, call.protect ? word : ~0u, s);
  };
  const auto moved = [](auto* pointer, int offset) { return pointer ? pointer + offset : pointer; };
  PaddedWord<T> padded[6];
  for (int offset = 0; offset < n; offset += kWordBits) {
    const WordPointers<T> own{moved(theta, offset), moved(first, offset),    moved(second, offset),
                              moved(slow, offset),  moved(g_forget, offset), moved(g_retain, offset)};
    const int lanes = n - offset;
    WordPointers<T> p = own;
    if (lanes < kWordBits) {
      p.theta = padded[0].fill(own.theta, lanes);
      if (first) p.first = padded[1].fill(own.first, lanes);
      if (second) p.second = padded[2].fill(own.second, lanes);
      if (slow) p.slow = padded[3].fill(own.slow, lanes);
      if (forget) p.forget = padded[4].fill(own.forget, lanes);
      if (retain) p.retain = padded[5].fill(own.retain, lanes);
    }
    update(p, offset);
    if (lanes < kWordBits) {
      std::copy(p.theta, p.theta + lanes, own.theta);
      if (first) std::copy(p.first, p.first + lanes, own.first);
      if (second) std::copy(p.second, p.second + lanes, own.second);
      if (slow) std::copy(p.slow, p.slow + lanes, own.slow);
    }
  }
  if constexpr (sizeof(T) == 4) {
    if (!in_place) store_half(lists, call, t, start, n, theta);
  }
}

template <Rule rule, bool forget, bool retain, bool interpolate>
void update_all(const StepLists& lists, const StepCall& call, const double* scalars, const WorkRange& work) {
  const StepScalars<float> single(scalars);
  const StepScalars<double> wide(scalars);
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t first, std::int64_t count) {
      for_each_strip(first, count, [&](std::int64_t start, int n) {
        if (lists.weights.dtype[t] == ScalarType::Double) {
          update_strip<rule, forget, retain, interpolate>(lists, call, wide, t, start, n);
        } else {
          update_strip<rule, forget, retain, interpolate>(lists, call, single, t, start, n);
        }
      });
    });
  });
}

template <Rule rule>
auto select_parts(bool forget, bool retain, bool interpolate) {
  if (forget && retain) return interpolate ? update_all<rule, true, true, true> : update_all<rule, true, true, false>;
  if (forget) return interpolate ? update_all<rule, true, false, true> : update_all<rule, true, false, false>;
  return interpolate ? update_all<rule, false, true, true> : update_all<rule, false, true, false>;
}

void update(const StepCall& call) {
  const double* s = static_cast<const double*>(call.scalars.data_ptr());
  if (s[kSkip] != 0.0) return;
  const StepLists lists{RawList(call.weights), RawList(call.slow),   RawList(call.first), RawList(call.second),
                        RawList(call.forget),  RawList(call.retain), RawList(call.bits)};
  const WorkRange work(sizes_of(call.weights));
  const bool forget = !call.forget.empty(), retain = !call.retain.empty(), interpolate = !call.slow.empty();
  if (!forget && !retain) {
    update_all<Rule::sgd, false, false, true>(lists, call, s, work);
    return;
  }
  using Run = void (*)(const StepLists&, const StepCall&, const double*, const WorkRange&);
  const std::array<Run, 4> runs{
      select_parts<Rule::sgd>(forget, retain, interpolate), select_parts<Rule::momentum>(forget, retain, interpolate),
      select_parts<Rule::adam>(forget, retain, interpolate), select_parts<Rule::adamw>(forget, retain, interpolate)};
  runs[size_t(call.rule)](lists, call, s, work);
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("step_", TORCH_BOX(&unlearn::step_<&unlearn::update>));
}
