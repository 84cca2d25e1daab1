// update and its derivative on the CPU.
#include "../operators/update.h"

#include "../math/reduce.h"
#include "../operators/dispatch.h"

#include "strips.h"

namespace unlearn {
namespace {

struct UpdateLists {
  RawList weights, slow, forget, retain, bits;

  explicit UpdateLists(const UpdateCall& call)
      : weights(call.weights), slow(call.slow), forget(call.forget), retain(call.retain), bits(call.bits) {}
};

// A strip of the operands in whole words of the opmath type; what is not read is null.
template <typename T>
struct UpdateStrip {
  const T *theta = nullptr, *slow = nullptr, *forget = nullptr, *retain = nullptr;
};

template <typename T>
struct UpdateBuffers {
  T theta[kStrip], slow[kStrip], forget[kStrip], retain[kStrip];
};

template <bool forget, bool retain, bool interpolate, typename T>
inline UpdateStrip<T> load_update(
    const UpdateLists& lists, size_t t, std::int64_t start, int n, UpdateBuffers<T>& buffers) {
  UpdateStrip<T> strip;
  strip.theta = load_words(lists.weights, t, start, n, buffers.theta);
  if constexpr (interpolate) strip.slow = load_words(lists.slow, t, start, n, buffers.slow);
  if constexpr (forget) strip.forget = load_words(lists.forget, t, start, n, buffers.forget);
  if constexpr (retain) strip.retain = load_words(lists.retain, t, start, n, buffers.retain);
  return strip;
}

// Calls body with the parts that a call has: forget, retain, interpolate.
template <typename Body>
void with_parts_of(const UpdateCall& call, const Body& body) {
  with_parts(!call.forget.empty(), !call.retain.empty(), !call.slow.empty(), body);
}

// Calls body(scalars, tensor, first weight, number of weights) for every strip of a block, with the scalars in the
// tensor's opmath type.
template <typename Body>
void visit_update_block(
    const UpdateLists& lists, const double* scalars, const WorkRange& work, std::int64_t block, const Body& body) {
  const StepScalars<float> f32(scalars);
  const StepScalars<double> f64(scalars);
  work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
    for_each_strip(begin, count, [&](std::int64_t start, int n) {
      if (lists.weights.dtype[t] == ScalarType::Double) {
        body(f64, t, start, n);
      } else {
        body(f32, t, start, n);
      }
    });
  });
}

// --- The function -------------------------------------------------------------------------------------------

template <bool forget, bool retain, bool interpolate, typename T>
inline __attribute__((always_inline)) void updated_word(
    const UpdateStrip<T>& p, int offset, std::uint32_t keep_forget, std::uint32_t keep_retain, const StepScalars<T>& s,
    T* __restrict result) {
  const T* __restrict theta = p.theta + offset;
  const T* __restrict slow = interpolate ? p.slow + offset : nullptr;
  const T* __restrict g_forget = forget ? p.forget + offset : nullptr;
  const T* __restrict g_retain = retain ? p.retain + offset : nullptr;
  UNLEARN_LANES
  for (int i = 0; i < kWordBits; ++i) {
    const WeightState<T> before{theta[i], T(0), T(0), interpolate ? slow[i] : T(0)};
    result[i] = update_weight<Rule::sgd, forget, retain, interpolate>(
                    before, forget ? g_forget[i] : T(0), retain ? g_retain[i] : T(0), lane_mask<T>(keep_forget, i),
                    lane_mask<T>(keep_retain, i), ~bits_t<T>(0), s)
                    .theta;
  }
}

template <bool forget, bool retain, bool interpolate, typename T>
void updated_strip(
    const UpdateLists& lists, const RawList& results, bool mask_retain, const StepScalars<T>& s, size_t t,
    std::int64_t start, int n) {
  UpdateBuffers<T> buffers;
  T result_buffer[kStrip];
  const UpdateStrip<T> strip = load_update<forget, retain, interpolate>(lists, t, start, n, buffers);
  T* result = place_words(results, t, start, n, result_buffer);
  for (int offset = 0; offset < n; offset += kWordBits) {
    const std::uint32_t word = word_at(lists.bits, t, (start + offset) / kWordBits);
    updated_word<forget, retain, interpolate>(strip, offset, word, mask_retain ? word : ~0u, s, result + offset);
  }
  if (result == result_buffer) store_strip(results, t, start, n, result);
}

void update_into(const UpdateCall& call, const TensorList& results) {
  const UpdateLists lists(call);
  const RawList out(results);
  const double* scalars = static_cast<const double*>(call.scalars.data_ptr());
  const WorkRange work(sizes_of(call.weights));
  with_parts_of(call, [&](auto forget, auto retain, auto interpolate) {
    for_each_block(work, [&](std::int64_t block) {
      visit_update_block(lists, scalars, work, block, [&](const auto& s, size_t t, std::int64_t start, int n) {
        updated_strip<forget.value, retain.value, interpolate.value>(lists, out, call.mask_retain, s, t, start, n);
      });
    });
  });
}

// --- Its derivative -----------------------------------------------------------------------------------------

// Explicit lanes, as in gradient_products.
struct UpdateLaneSums {
  double forget[kWordBits] = {}, retain[kWordBits] = {}, theta[kWordBits] = {}, drift[kWordBits] = {};

  UpdateSums total() const {
    UpdateSums sum[kWordBits];
    for (int i = 0; i < kWordBits; ++i) sum[i] = {forget[i], retain[i], theta[i], drift[i]};
    combine_in_fixed_order(sum, kWordBits);
    return sum[0];
  }
};

struct UpdateGradientLists {
  RawList grad_output, weights, slow, forget, retain;
};

// Where a strip's gradients go. One that no caller needs goes to a buffer and no further: a store to the first-level
// cache costs less than a loop of its own for each choice of gradients.
template <typename T>
struct GradientStrip {
  T *theta, *slow, *forget, *retain;
};

// sums: whether the scalars' gradients are needed; without them no operand is read.
template <bool sums, bool forget, bool retain, bool interpolate, typename T>
inline __attribute__((always_inline)) void differentiate_word(
    const T* __restrict d, const UpdateStrip<T>& p, int offset, std::uint32_t keep_forget, std::uint32_t keep_retain,
    const StepScalars<T>& s, const GradientStrip<T>& to, UpdateLaneSums& lanes) {
  const T* __restrict theta = sums ? p.theta + offset : nullptr;
  const T* __restrict slow = sums && interpolate ? p.slow + offset : nullptr;
  const T* __restrict g_forget = sums && forget ? p.forget + offset : nullptr;
  const T* __restrict g_retain = sums && retain ? p.retain + offset : nullptr;
  T* __restrict d_theta = to.theta + offset;
  T* __restrict d_slow = to.slow + offset;
  T* __restrict d_forget = to.forget + offset;
  T* __restrict d_retain = to.retain + offset;
  UNLEARN_LANES
  for (int i = 0; i < kWordBits; ++i) {
    const WeightState<T> before{sums ? theta[i] : T(0), T(0), T(0), sums && interpolate ? slow[i] : T(0)};
    const UpdateGradient<T> gradient = update_gradient<forget, retain, interpolate>(
        d[offset + i], before, sums && forget ? g_forget[i] : T(0), sums && retain ? g_retain[i] : T(0),
        lane_mask<T>(keep_forget, i), lane_mask<T>(keep_retain, i), s);
    d_theta[i] = gradient.theta;
    if constexpr (interpolate) d_slow[i] = gradient.slow;
    if constexpr (forget) d_forget[i] = gradient.forget;
    if constexpr (retain) d_retain[i] = gradient.retain;
    if constexpr (sums && forget) lanes.forget[i] += gradient.terms.forget;
    if constexpr (sums && retain) lanes.retain[i] += gradient.terms.retain;
    if constexpr (sums && (forget || retain)) lanes.theta[i] += gradient.terms.theta;
    if constexpr (sums && interpolate) lanes.drift[i] += gradient.terms.drift;
  }
}

template <bool sums, bool forget, bool retain, bool interpolate, typename T>
void differentiate_strip(
    const UpdateLists& lists, const UpdateGradientLists& gradients, bool mask_retain, const StepScalars<T>& s, size_t t,
    std::int64_t start, int n, UpdateLaneSums& lanes) {
  UpdateBuffers<T> buffers, results;
  T output_buffer[kStrip];
  const T* d = load_words(gradients.grad_output, t, start, n, output_buffer);
  UpdateStrip<T> strip;
  if constexpr (sums) strip = load_update<forget, retain, interpolate>(lists, t, start, n, buffers);
  const auto place = [&](const RawList& list, T* buffer) {
    return list.empty() ? buffer : place_words(list, t, start, n, buffer);
  };
  const GradientStrip<T> to{
      place(gradients.weights, results.theta), place(gradients.slow, results.slow),
      place(gradients.forget, results.forget), place(gradients.retain, results.retain)};
  for (int offset = 0; offset < n; offset += kWordBits) {
    const std::uint32_t word = word_at(lists.bits, t, (start + offset) / kWordBits);
    differentiate_word<sums, forget, retain, interpolate>(
        d, strip, offset, word, mask_retain ? word : ~0u, s, to, lanes);
  }
  const auto store = [&](const RawList& list, const T* buffer, const T* values) {
    if (!list.empty() && values == buffer) store_strip(list, t, start, n, values);
  };
  store(gradients.weights, results.theta, to.theta);
  store(gradients.slow, results.slow, to.slow);
  store(gradients.forget, results.forget, to.forget);
  store(gradients.retain, results.retain, to.retain);
}

void differentiate_update(const UpdateCall& call, const TensorList& grad_outputs, const UpdateGradients& gradients) {
  const UpdateLists lists(call);
  const UpdateGradientLists to{
      RawList(grad_outputs), RawList(gradients.weights), RawList(gradients.slow), RawList(gradients.forget),
      RawList(gradients.retain)};
  const double* scalars = static_cast<const double*>(call.scalars.data_ptr());
  const WorkRange work(sizes_of(call.weights));
  const bool for_scalars = gradients.scalars.numel() != 0;
  std::vector<UpdateSums> partials(size_t(std::max<std::int64_t>(work.blocks(), 1)));
  with_parts_of(call, [&](auto forget, auto retain, auto interpolate) {
    with_flag(for_scalars, [&](auto sums) {
      for_each_block(work, [&](std::int64_t block) {
        UpdateLaneSums lanes;
        visit_update_block(lists, scalars, work, block, [&](const auto& s, size_t t, std::int64_t start, int n) {
          differentiate_strip<sums.value, forget.value, retain.value, interpolate.value>(
              lists, to, call.mask_retain, s, t, start, n, lanes);
        });
        partials[size_t(block)] = lanes.total();
      });
    });
  });
  if (!for_scalars) return;
  combine_in_fixed_order(partials.data(), std::int64_t(partials.size()));
  double* out = static_cast<double*>(gradients.scalars.data_ptr());
  update_scalar_gradients(partials[0], call.stepped(), !call.slow.empty(), scalars, out);
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("update", TORCH_BOX(&unlearn::update<&unlearn::update_into>));
  m.impl("update_backward", TORCH_BOX(&unlearn::update_backward<&unlearn::differentiate_update>));
}
