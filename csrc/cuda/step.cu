// step_ on CUDA: one launch for a list, as long as the table holds it.
#include "../operators/step.h"

#include <new>

#include "../operators/dispatch.h"
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
  static constexpr bool with_exp_avg = (forget || retain) && has_exp_avg(rule);
  static constexpr bool with_exp_avg_sq = (forget || retain) && has_exp_avg_sq(rule);
  static constexpr int weights = 0;
  static constexpr int exp_avg = 1;
  static constexpr int exp_avg_sq = exp_avg + with_exp_avg;
  static constexpr int slow = exp_avg_sq + with_exp_avg_sq;
  static constexpr int forget_grads = slow + interpolate;
  static constexpr int retain_grads = forget_grads + forget;
  static constexpr int bits = retain_grads + retain;
  // Storage that differs from tensor to tensor; moments and slow weights are of the opmath type.
  static constexpr int weights_storage = 0;
  static constexpr int forget_storage = 1;
  static constexpr int retain_storage = forget_storage + forget;
};

__device__ __forceinline__ void store_weights(
    const StepLaunch& launch, std::uint32_t index, Storage storage, char* base, std::int64_t begin, int n,
    std::uint32_t touch, const Octet<float>& before, const float* values) {
  if (storage == Storage::f32) {
    store_octet(base, begin, n, values);
    return;
  }
  std::uint16_t rounded[kOctet];
  if (storage == Storage::bf16 && launch.stochastic) {
    const std::uint32_t stream = rounding_stream(launch.seed, index);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      rounded[k] = float_to_bfloat16_stochastic(values[k], rounding_noise(stream, std::uint64_t(begin + k)));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) rounded[k] = round_to_half(values[k], storage);
  }
  // A weight that may not be touched keeps its stored bits: there and back, a NaN could change its payload.
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    if (!((touch >> k) & 1u)) rounded[k] = half_bits(before.word, k);
  }
  store_halves(base, begin, n, rounded);
}

__device__ __forceinline__ void store_weights(
    const StepLaunch&, std::uint32_t, Storage, char* base, std::int64_t begin, int n, std::uint32_t,
    const Octet<double>&, const double* values) {
  store_octet(base, begin, n, values);
}

template <Rule rule, bool forget, bool retain, bool interpolate, typename T>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepLaunch launch) {
  using Columns = StepColumns<rule, forget, retain, interpolate>;
  constexpr bool with_exp_avg = Columns::with_exp_avg, with_exp_avg_sq = Columns::with_exp_avg_sq;
  alignas(StepScalars<T>) __shared__ unsigned char shared[sizeof(StepScalars<T>)];
  const double* scalars = launch.scalars.values();
  if (threadIdx.x == 0) new (shared) StepScalars<T>(scalars); // double arithmetic, once a block
  __syncthreads();
  if (scalars[kSkip] != 0.0) return;
  const StepScalars<T>& s = *reinterpret_cast<const StepScalars<T>*>(shared);

  const int t = table.tensor_of(blockIdx.x);
  const Storage weights_storage = table.storage(Columns::weights_storage, t);
  const Storage forget_storage = forget ? table.storage(Columns::forget_storage, t) : Storage::f32;
  const Storage retain_storage = retain ? table.storage(Columns::retain_storage, t) : Storage::f32;
  constexpr Storage state_storage = sizeof(T) == 8 ? Storage::f64 : Storage::f32;

  for_each_octet(table, t, [&](std::int64_t i, int n) {
    Octet<T> stored, stored_exp_avg, stored_exp_avg_sq, stored_slow, stored_forget, stored_retain;
    load_octet(stored, weights_storage, table.pointer(Columns::weights, t), i, n);
    if constexpr (with_exp_avg) load_octet(stored_exp_avg, state_storage, table.pointer(Columns::exp_avg, t), i, n);
    if constexpr (with_exp_avg_sq)
      load_octet(stored_exp_avg_sq, state_storage, table.pointer(Columns::exp_avg_sq, t), i, n);
    if constexpr (interpolate) load_octet(stored_slow, state_storage, table.pointer(Columns::slow, t), i, n);
    if constexpr (forget) load_octet(stored_forget, forget_storage, table.pointer(Columns::forget_grads, t), i, n);
    if constexpr (retain) load_octet(stored_retain, retain_storage, table.pointer(Columns::retain_grads, t), i, n);
    const std::uint32_t mask = launch.has_bits ? load_mask(table.pointer(Columns::bits, t), i) : 0xffu;
    const std::uint32_t keep_retain = launch.mask_retain ? mask : 0xffu, touch = launch.protect ? mask : 0xffu;

    T theta[kOctet], exp_avg[kOctet], exp_avg_sq[kOctet], slow[kOctet], g_forget[kOctet], g_retain[kOctet];
    widen(stored, weights_storage, theta);
    if constexpr (with_exp_avg) widen(stored_exp_avg, state_storage, exp_avg);
    if constexpr (with_exp_avg_sq) widen(stored_exp_avg_sq, state_storage, exp_avg_sq);
    if constexpr (interpolate) widen(stored_slow, state_storage, slow);
    if constexpr (forget) widen(stored_forget, forget_storage, g_forget);
    if constexpr (retain) widen(stored_retain, retain_storage, g_retain);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      WeightState<T> w{
          theta[k], with_exp_avg ? exp_avg[k] : T(0), with_exp_avg_sq ? exp_avg_sq[k] : T(0),
          interpolate ? slow[k] : T(0)};
      w = update_weight<rule, forget, retain, interpolate>(
          w, forget ? g_forget[k] : T(0), retain ? g_retain[k] : T(0), lane_mask<T>(mask, k),
          lane_mask<T>(keep_retain, k), lane_mask<T>(touch, k), s);
      theta[k] = w.theta;
      if constexpr (with_exp_avg) exp_avg[k] = w.exp_avg;
      if constexpr (with_exp_avg_sq) exp_avg_sq[k] = w.exp_avg_sq;
      if constexpr (interpolate) slow[k] = w.slow;
    }
    store_weights(
        launch, table.index(t), weights_storage, table.pointer(Columns::weights, t), i, n, touch, stored, theta);
    if constexpr (with_exp_avg) store_octet(table.pointer(Columns::exp_avg, t), i, n, exp_avg);
    if constexpr (with_exp_avg_sq) store_octet(table.pointer(Columns::exp_avg_sq, t), i, n, exp_avg_sq);
    if constexpr (interpolate) store_octet(table.pointer(Columns::slow, t), i, n, slow);
  });
}

using StepKernel = void (*)(Table, StepLaunch);

void update(const StepCall& call) {
  const OnDevice device(call.weights[0]);
  const bool forget = !call.forget.empty(), retain = !call.retain.empty(), interpolate = !call.slow.empty();
  const bool stepped = forget || retain;
  const RawList none{TensorList{}};
  const RawList weights(call.weights), slow(call.slow), exp_avg(call.exp_avg), exp_avg_sq(call.exp_avg_sq);
  const RawList forget_grads(call.forget), retain_grads(call.retain), bits(call.bits);
  Columns columns;
  columns.add(weights, /*mixed=*/true);
  columns.add(stepped && has_exp_avg(call.rule) ? exp_avg : none);
  columns.add(stepped && has_exp_avg_sq(call.rule) ? exp_avg_sq : none);
  columns.add(slow);
  columns.add(forget_grads, /*mixed=*/true);
  columns.add(retain_grads, /*mixed=*/true);
  columns.add(bits);

  StepLaunch launch{};
  launch.scalars = source_of(call.scalars, call.weights[0]);
  launch.seed = call.seed;
  launch.has_bits = !call.bits.empty();
  launch.mask_retain = call.mask_retain;
  launch.protect = call.protect;
  launch.stochastic = call.stochastic;

  const auto sizes = sizes_of(call.weights);
  for (const bool f64 : {false, true}) {
    const auto kernel = with_step(
        call.rule, forget, retain, interpolate,
        [f64](auto rule, auto forget, auto retain, auto interpolate) -> StepKernel {
          return f64 ? step_kernel<rule.value, forget.value, retain.value, interpolate.value, double>
                     : step_kernel<rule.value, forget.value, retain.value, interpolate.value, float>;
        });
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return (weights.dtype[t] == ScalarType::Double) == f64; },
        [&](const Table& table) { device.launch("step_", kernel, table.units, table, launch); });
  }
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("step_", TORCH_BOX(&unlearn::step_<&unlearn::update>));
}
