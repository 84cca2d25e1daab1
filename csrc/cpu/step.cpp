// step_: the fused update of a list of weights in one pass over memory.
#include "../math/update.h"

#include <array>

#include "../math/rounding.h"
#include "strips.h"

namespace unlearn {
namespace {

struct StepLists {
  RawList weights, slow, first, second, forget, retain, bits;
};

struct StepOptions {
  bool mask_retain, protect;
  bool stochastic;
  std::uint64_t seed;
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
    const StepOptions& options,
    size_t t,
    std::int64_t start,
    int n,
    const float* values) {
  std::uint16_t* to = lists.weights.at<std::uint16_t>(t, start);
  std::uint16_t rounded[kStrip];
  if (lists.weights.dtype[t] == ScalarType::Half) {
    float_to_half(values, rounded, n);
  } else if (options.stochastic) {
    const std::uint32_t stream = rounding_stream(options.seed, t);
    for (int i = 0; i < n; ++i) {
      rounded[i] = float_to_bfloat16_stochastic(values[i], rounding_noise(stream, std::uint64_t(start + i)));
    }
  } else {
    for (int i = 0; i < n; ++i) rounded[i] = float_to_bfloat16(values[i]);
  }
  if (options.protect) {
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
    const StepOptions& options,
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
        p, word, options.mask_retain ? word : ~0u, options.protect ? word : ~0u, s);
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
    if (!in_place) store_half(lists, options, t, start, n, theta);
  }
}

template <Rule rule, bool forget, bool retain, bool interpolate>
void run(const StepLists& lists, const StepOptions& options, const double* scalars, const WorkRange& work) {
  const StepScalars<float> single(scalars);
  const StepScalars<double> wide(scalars);
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t first, std::int64_t count) {
      for_each_strip(first, count, [&](std::int64_t start, int n) {
        if (lists.weights.dtype[t] == ScalarType::Double) {
          update_strip<rule, forget, retain, interpolate>(lists, options, wide, t, start, n);
        } else {
          update_strip<rule, forget, retain, interpolate>(lists, options, single, t, start, n);
        }
      });
    });
  });
}

template <Rule rule>
auto select_parts(bool forget, bool retain, bool interpolate) {
  if (forget && retain) return interpolate ? run<rule, true, true, true> : run<rule, true, true, false>;
  if (forget) return interpolate ? run<rule, true, false, true> : run<rule, true, false, false>;
  return interpolate ? run<rule, false, true, true> : run<rule, false, true, false>;
}

void step(
    TensorList weights,
    TensorList slow,
    TensorList first_moments,
    TensorList second_moments,
    TensorList forget_grads,
    TensorList retain_grads,
    TensorList bits,
    Tensor scalars,
    int64_t rule_code,
    bool mask_retain,
    bool protect,
    int64_t rounding_seed) {
  Operands operands("step_", "weights", weights);
  if (rule_code < 0 || rule_code > int(Rule::adamw)) {
    fail("step_: rule: expected 0 (sgd) to 3 (adamw), got " + std::to_string(rule_code));
  }
  const Rule rule = Rule(rule_code);
  if (scalars.scalar_type() != ScalarType::Double || !scalars.is_contiguous() || !scalars.is_cpu() ||
      scalars.numel() != kScalarCount) {
    fail("step_: scalars: expected a contiguous float64 CPU tensor of " + std::to_string(int(kScalarCount)) +
         " numbers as ops.scalars() makes it, got " + torch::headeronly::toString(scalars.scalar_type()) +
         " of shape " + shape_of(scalars));
  }
  const bool stepped = !forget_grads.empty() || !retain_grads.empty();
  if (!stepped && slow.empty()) {
    fail("step_: forget_grads, retain_grads: expected at least one list of gradients, got none");
  }
  if (protect && bits.empty()) fail("step_: protect: expected bits that say what to protect, got none");

  const bool first = stepped && has_first_moment(rule), second = stepped && has_second_moment(rule);
  operands.check_list({"weights", &weights}, kWeightDtypes);
  operands.check_list({"forget_grads", &forget_grads}, kWeightDtypes);
  operands.check_list({"retain_grads", &retain_grads}, kWeightDtypes);
  operands.check_state({"slow", &slow}, /*required=*/false);
  operands.check_state({"first_moments", &first_moments}, /*required=*/first);
  operands.check_state({"second_moments", &second_moments}, /*required=*/second);
  operands.check_bits({"bits", &bits});
  operands.check_writable({{"weights", &weights},
                           {"slow", &slow},
                           {"first_moments", &first_moments},
                           {"second_moments", &second_moments}});

  const double* s = scalars.const_data_ptr<double>();
  if (s[kSkip] != 0.0) return;

  operands.make_reference_dense(/*written=*/true);
  for (TensorList* list : {&slow, &first_moments, &second_moments}) operands.align(*list, /*written=*/true);
  for (TensorList* list : {&forget_grads, &retain_grads}) operands.align(*list, /*written=*/false);

  const StepLists raw{RawList(weights),       RawList(slow),         RawList(first_moments), RawList(second_moments),
                      RawList(forget_grads), RawList(retain_grads), RawList(bits)};
  const StepOptions options{mask_retain, protect, rounding_seed >= 0, std::uint64_t(rounding_seed)};
  const WorkRange work(sizes_of(weights));
  const bool forget = !forget_grads.empty(), retain = !retain_grads.empty(), interpolate = !slow.empty();
  if (!stepped) {
    run<Rule::sgd, false, false, true>(raw, options, s, work);
  } else {
    using Run = void (*)(const StepLists&, const StepOptions&, const double*, const WorkRange&);
    const std::array<Run, 4> runs{
        select_parts<Rule::sgd>(forget, retain, interpolate), select_parts<Rule::momentum>(forget, retain, interpolate),
        select_parts<Rule::adam>(forget, retain, interpolate), select_parts<Rule::adamw>(forget, retain, interpolate)};
    runs[size_t(rule)](raw, options, s, work);
  }
  operands.write_back();
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("step_", TORCH_BOX(&unlearn::step));
}
