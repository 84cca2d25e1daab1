// step_ on CUDA: one launch for a list, as long as the table holds it.
#include "../operators/step.h"

#include <new>

#include "launch.cuh"
#include "octet.cuh"

namespace unlearn {
namespace {

// What a launch needs beside the table.
struct StepLaunch {
  ScalarSource scalars;
  std::uint64_t seed;
  bool has_bits, mask_retain, protect, stochastic;
};

// The columns in their order. A column that a variant lacks has no place.
template <Rule rule, bool forget, bool retain, bool interpolate>
struct StepColumns {
  static constexpr bool with_first = (forget || retain) && has_first_moment(rule);
  static constexpr bool with_second = (forget || retain) && has_second_moment(rule);
  static constexpr int weights = 0;
  static constexpr int first = 1;
  static constexpr int second = first + with_first;
  static constexpr int slow = second + with_second;
  static constexpr int forget_grads = slow + interpolate;
  static constexpr int retain_grads = forget_grads + forget;
  static constexpr int bits = retain_grads + retain;
  // Storage that differs from tensor to tensor; moments and slow weights are of the opmath type.
  static constexpr int weights_code = 0;
  static constexpr int forget_code = 1;
  static constexpr int retain_code = forget_code + forget;
};

__device__ __forceinline__ void store_weights(
    const StepLaunch& launch, std::uint32_t index, Code code, char* base, std::int64_t first, int n,
    std::uint32_t touch, const Octet<float>& before, const float* values) {
  if (code == Code::single) {
    store_octet(base, first, n, values);
    return;
  }
  std::uint16_t rounded[kOctet];
  if (code == Code::bfloat16 && launch.stochastic) {
    const std::uint32_t stream = rounding_stream(launch.seed, index);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      rounded[k] = float_to_bfloat16_stochastic(values[k], rounding_noise(stream, std::uint64_t(first + k)));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) rounded[k] = round_to_half(values[k], code);
  }
  // A weight that may not be touched keeps its stored bits: there and back, a NaN could change its payload.
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    if (!((touch >> k) & 1u)) rounded[k] = half_bits(before, k);
  }
  store_halves(base, first, n, rounded);
}

__device__ __forceinline__ void store_weights(
    const StepLaunch&, std::uint32_t, Code, char* base, std::int64_t first, int n, std::uint32_t,
    const Octet<double>&, const double* values) {
  store_octet(base, first, n, values);
}

template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepLaunch launch) {
  using Columns = StepColumns<rule, forget, retain, interpolate>;
  constexpr bool with_first = Columns::with_first, with_second = Columns::with_second;
  alignas(StepScalars<T>) __shared__ unsigned char shared[sizeof(StepScalars<T>)];
  const double* given = launch.scalars.values();
  if (threadIdx.x == 0) new (shared) StepScalars<T>(given); // double arithmetic, once a block
  __syncthreads();
  if (given[kSkip] != 0.0) return;
  const StepScalars<T>& s = *reinterpret_cast<const StepScalars<T>*>(shared);

  const int t = table.tensor_of(blockIdx.x);
  const Code weights_code = table.code(Columns::weights_code, t);
  const Code forget_code = forget ? table.code(Columns::forget_code, t) : Code::single;
  const Code retain_code = retain ? table.code(Columns::retain_code, t) : Code::single;
  constexpr Code state_code = sizeof(T) == 8 ? Code::wide : Code::single;

  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<T> stored, stored_first, stored_second, stored_slow, stored_forget, stored_retain;
    load_octet(stored, weights_code, table.pointer(Columns::weights, t), i, n);
    if constexpr (with_first) load_octet(stored_first, state_code, table.pointer(Columns::first, t), i, n);
    if constexpr (with_second) load_octet(stored_second, state_code, table.pointer(Columns::second, t), i, n);
    if constexpr (interpolate) load_octet(stored_slow, state_code, table.pointer(Columns::slow, t), i, n);
    if constexpr (forget) load_octet(stored_forget, forget_code, table.pointer(Columns::forget_grads, t), i, n);
    if constexpr (retain) load_octet(stored_retain, retain_code, table.pointer(Columns::retain_grads, t), i, n);
    const std::uint32_t mask = launch.has_bits ? load_mask(table.pointer(Columns::bits, t), i) : 0xffu;
    const std::uint32_t keep_retain = launch.mask_retain ? mask : 0xffu, touch = launch.protect ? mask : 0xffu;

    T theta[kOctet], first[kOctet], second[kOctet], slow[kOctet], g_forget[kOctet], g_retain[kOctet];
    widen(stored, weights_code, theta);
    if constexpr (with_first) widen(stored_first, state_code, first);
    if constexpr (with_second) widen(stored_second, state_code, second);
    if constexpr (interpolate) widen(stored_slow, state_code, slow);
    if constexpr (forget) widen(stored_forget, forget_code, g_forget);
    if constexpr (retain) widen(stored_retain, retain_code, g_retain);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      WeightState<T> w{theta[k], with_first ? first[k] : T(0), with_second ? second[k] : T(0),
                       interpolate ? slow[k] : T(0)};
      w = update_weight<rule, forget, retain, interpolate>(
          w, forget ? g_forget[k] : T(0), retain ? g_retain[k] : T(0), lane_mask<T>(mask, k),
          lane_mask<T>(keep_retain, k), lane_mask<T>(touch, k), s);
      theta[k] = w.theta;
      if constexpr (with_first) first[k] = w.first;
      if constexpr (with_second) second[k] = w.second;
      if constexpr (interpolate) slow[k] = w.slow;
    }
    store_weights(launch, table.index(t), weights_code, table.pointer(Columns::weights, t), i, n, touch, stored, theta);
    if constexpr (with_first) store_octet(table.pointer(Columns::first, t), i, n, first);
    if constexpr (with_second) store_octet(table.pointer(Columns::second, t), i, n, second);
    if constexpr (interpolate) store_octet(table.pointer(Columns::slow, t), i, n, slow);
  });
}

using StepKernel = void (*)(Table, StepLaunch);

template <typename T, Rule rule>
StepKernel select_parts(bool forget, bool retain, bool interpolate) {
  if (forget && retain) {
    return interpolate ? step_kernel<rule, true, true, true, T> : step_kernel<rule, true, true, false, T>;
  }
  if (forget) return interpolate ? step_kernel<rule, true, false, true, T> : step_kernel<rule, true, false, false, T>;
  if (retain) return interpolate ? step_kernel<rule, false, true, true, T> : step_kernel<rule, false, true, false, T>;
  return step_kernel<Rule::sgd, false, false, true, T>;
}

template <typename T>
StepKernel select_kernel(Rule rule, bool forget, bool retain, bool interpolate) {
  switch (rule) {
    case Rule::sgd:
      return select_parts<T, Rule::sgd>(forget, retain, interpolate);
    case Rule::momentum:
      return select_parts<T, Rule::momentum>(forget, retain, interpolate);
    case Rule::adam:
      return select_parts<T, Rule::adam>(forget, retain, interpolate);
    default:
      return select_parts<T, Rule::adamw>(forget, retain, interpolate);
  }
}

void update(const StepCall& call) {
  const OnDevice device(call.weights[0]);
  const bool forget = !call.forget.empty(), retain = !call.retain.empty(), interpolate = !call.slow.empty();
  const bool stepped = forget || retain;
  const RawList none{TensorList{}};
  const RawList weights(call.weights), slow(call.slow), first(call.first), second(call.second);
  const RawList forget_grads(call.forget), retain_grads(call.retain), bits(call.bits);
  Columns columns;
  columns.add(weights, /*coded=*/true);
  columns.add(stepped && has_first_moment(call.rule) ? first : none);
  columns.add(stepped && has_second_moment(call.rule) ? second : none);
  columns.add(slow);
  columns.add(forget_grads, /*coded=*/true);
  columns.add(retain_grads, /*coded=*/true);
  columns.add(bits);

  StepLaunch launch{};
  launch.scalars = source_of(call.scalars, call.weights[0]);
  launch.seed = call.seed;
  launch.has_bits = !call.bits.empty();
  launch.mask_retain = call.mask_retain;
  launch.protect = call.protect;
  launch.stochastic = call.stochastic;

  const auto sizes = sizes_of(call.weights);
  for (const bool wide : {false, true}) {
    const StepKernel kernel = wide ? select_kernel<double>(call.rule, forget, retain, interpolate)
                                   : select_kernel<float>(call.rule, forget, retain, interpolate);
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return (weights.dtype[t] == ScalarType::Double) == wide; },
        [&](const Table& table) { device.launch("step_", kernel, table.units, table, launch); });
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("step_", TORCH_BOX(&unlearn::step_<&unlearn::update>));
}
