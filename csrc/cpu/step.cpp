// step_ on the CPU.
#include "../operators/step.h"

#include "../math/rounding.h"
#include "../operators/dispatch.h"
#include "strips.h"

namespace unlearn {
namespace {

struct StepLists {
  RawList weights, slow, exp_avg, exp_avg_sq, forget, retain, bits;
};

// What a word of weights is made of, in the opmath type.
template <typename T>
struct WordPointers {
  T *theta, *exp_avg, *exp_avg_sq, *slow;
  const T *forget, *retain;
};

// With a constant trip count and lanes that do not alias the compiler turns this loop into full-width vector code.
template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
inline __attribute__((always_inline)) void update_word(
    const WordPointers<T>& p, std::uint32_t keep_forget, std::uint32_t keep_retain, std::uint32_t touch,
    const StepScalars<T>& s) {
  constexpr bool with_exp_avg = (forget || retain) && has_exp_avg(rule);
  constexpr bool with_exp_avg_sq = (forget || retain) && has_exp_avg_sq(rule);
  T* __restrict theta = p.theta;
  T* __restrict exp_avg = p.exp_avg;
  T* __restrict exp_avg_sq = p.exp_avg_sq;
  T* __restrict slow = p.slow;
  const T* __restrict g_forget = p.forget;
  const T* __restrict g_retain = p.retain;
  UNLEARN_LANES
  for (int i = 0; i < kWordBits; ++i) {
    WeightState<T> w{
        theta[i], with_exp_avg ? exp_avg[i] : T(0), with_exp_avg_sq ? exp_avg_sq[i] : T(0),
        interpolate ? slow[i] : T(0)};
    w = update_weight<rule, forget, retain, interpolate>(
        w, forget ? g_forget[i] : T(0), retain ? g_retain[i] : T(0), lane_mask<T>(keep_forget, i),
        lane_mask<T>(keep_retain, i), lane_mask<T>(touch, i), s);
    theta[i] = w.theta;
    if constexpr (with_exp_avg) exp_avg[i] = w.exp_avg;
    if constexpr (with_exp_avg_sq) exp_avg_sq[i] = w.exp_avg_sq;
    if constexpr (interpolate) slow[i] = w.slow;
  }
}

// Writes a strip of half-width weights. A weight that may not be touched keeps its stored bits: converting a NaN
// there and back would change its payload.
void store_half(
    const StepLists& lists, const StepCall& call, size_t t, std::int64_t start, int n, const float* values) {
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
    const StepLists& lists, const StepCall& call, const StepScalars<T>& s, size_t t, std::int64_t start, int n) {
  // Load: in the opmath type, in place where that is the tensor's own.
  T theta_buffer[kStrip], forget_buffer[kStrip], retain_buffer[kStrip];
  const bool in_place = lists.weights.dtype[t] == kOpmath<T>;
  if (!in_place) convert_strip(lists.weights, t, start, n, theta_buffer);
  T* theta = in_place ? lists.weights.at<T>(t, start) : theta_buffer;
  T* exp_avg = lists.exp_avg.empty() ? nullptr : lists.exp_avg.at<T>(t, start);
  T* exp_avg_sq = lists.exp_avg_sq.empty() ? nullptr : lists.exp_avg_sq.at<T>(t, start);
  T* slow = interpolate ? lists.slow.at<T>(t, start) : nullptr;
  const T* g_forget = forget ? load_strip(lists.forget, t, start, n, forget_buffer) : nullptr;
  const T* g_retain = retain ? load_strip(lists.retain, t, start, n, retain_buffer) : nullptr;

  // Update, word by word; a tensor's last, partial word goes through padded copies.
  const auto update = [&](const WordPointers<T>& p, int offset) {
    const std::uint32_t word = word_at(lists.bits, t, (start + offset) / kWordBits);
    update_word<rule, forget, retain, interpolate>(
        p, word, call.mask_retain ? word : ~0u, call.protect ? word : ~0u, s);
  };
  const auto moved = [](auto* pointer, int offset) { return pointer ? pointer + offset : pointer; };
  PaddedWord<T> padded[6];
  for (int offset = 0; offset < n; offset += kWordBits) {
    const WordPointers<T> in_memory{moved(theta, offset), moved(exp_avg, offset),  moved(exp_avg_sq, offset),
                                    moved(slow, offset),  moved(g_forget, offset), moved(g_retain, offset)};
    const int lanes = n - offset;
    WordPointers<T> p = in_memory;
    if (lanes < kWordBits) {
      p.theta = padded[0].fill(in_memory.theta, lanes);
      if (exp_avg) p.exp_avg = padded[1].fill(in_memory.exp_avg, lanes);
      if (exp_avg_sq) p.exp_avg_sq = padded[2].fill(in_memory.exp_avg_sq, lanes);
      if (slow) p.slow = padded[3].fill(in_memory.slow, lanes);
      if (forget) p.forget = padded[4].fill(in_memory.forget, lanes);
      if (retain) p.retain = padded[5].fill(in_memory.retain, lanes);
    }
    update(p, offset);
    if (lanes < kWordBits) {
      std::copy(p.theta, p.theta + lanes, in_memory.theta);
      if (exp_avg) std::copy(p.exp_avg, p.exp_avg + lanes, in_memory.exp_avg);
      if (exp_avg_sq) std::copy(p.exp_avg_sq, p.exp_avg_sq + lanes, in_memory.exp_avg_sq);
      if (slow) std::copy(p.slow, p.slow + lanes, in_memory.slow);
    }
  }
  // Store: weights of half width alone were updated in a buffer.
  if constexpr (sizeof(T) == 4) {
    if (!in_place) store_half(lists, call, t, start, n, theta);
  }
}

template <Rule rule, bool forget, bool retain, bool interpolate>
void update_all(const StepLists& lists, const StepCall& call, const double* scalars, const WorkRange& work) {
  const StepScalars<float> f32(scalars);
  const StepScalars<double> f64(scalars);
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      for_each_strip(begin, count, [&](std::int64_t start, int n) {
        if (lists.weights.dtype[t] == ScalarType::Double) {
          update_strip<rule, forget, retain, interpolate>(lists, call, f64, t, start, n);
        } else {
          update_strip<rule, forget, retain, interpolate>(lists, call, f32, t, start, n);
        }
      });
    });
  });
}

void update(const StepCall& call) {
  const double* s = static_cast<const double*>(call.scalars.data_ptr());
  if (s[kSkip] != 0.0) return;
  const StepLists lists{RawList(call.weights), RawList(call.slow),   RawList(call.exp_avg), RawList(call.exp_avg_sq),
                        RawList(call.forget),  RawList(call.retain), RawList(call.bits)};
  const WorkRange work(sizes_of(call.weights));
  const bool forget = !call.forget.empty(), retain = !call.retain.empty(), interpolate = !call.slow.empty();
  with_step(call.rule, forget, retain, interpolate, [&](auto rule, auto forget, auto retain, auto interpolate) {
    update_all<rule.value, forget.value, retain.value, interpolate.value>(lists, call, s, work);
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("step_", TORCH_BOX(&unlearn::step_<&unlearn::update>));
}
