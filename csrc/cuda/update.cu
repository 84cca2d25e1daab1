// update and its derivative on CUDA.
#include "../operators/update.h"

#include <torch/csrc/stable/ops.h>

#include <new>

#include "../math/reduce.h"
#include "../operators/dispatch.h"

#include "launch.cuh"
#include "octet.cuh"
#include "partials.cuh"

namespace unlearn {
namespace {

// The columns' places, -1 for those that are absent, and what else a launch needs beside the table. The dtypes of
// weights and gradients are looked up by tensor, in this order.
struct UpdateLaunch {
  ScalarSource scalars;
  int weights, forget, retain, slow, bits;                    // operands
  int grad_output, to_weights, to_forget, to_retain, to_slow; // results, but for grad_output
  int weights_storage, forget_storage, retain_storage, grad_output_storage;
  bool mask_retain, sums;
};

__device__ __forceinline__ void round_and_store(
    Storage storage, char* base, std::int64_t begin, int n, const float* values) {
  if (storage == Storage::f32) {
    store_octet(base, begin, n, values);
  } else if (storage == Storage::f64) {
    double f64[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) f64[k] = double(values[k]);
    store_octet(base, begin, n, f64);
  } else {
    std::uint16_t rounded[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) rounded[k] = round_to_half(values[k], storage);
    store_halves(base, begin, n, rounded);
  }
}

__device__ __forceinline__ void round_and_store(
    Storage storage, char* base, std::int64_t begin, int n, const double* values) {
  if (storage == Storage::f64) {
    store_octet(base, begin, n, values);
  } else {
    float narrow[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) narrow[k] = float(values[k]);
    round_and_store(storage, base, begin, n, narrow);
  }
}

template <typename T>
__device__ __forceinline__ void load_values(Storage storage, const char* base, std::int64_t begin, int n, T* values) {
  Octet<T> stored;
  load_octet(stored, storage, base, begin, n);
  widen(stored, storage, values);
}

template <typename T>
__device__ __forceinline__ const StepScalars<T>& shared_scalars(const UpdateLaunch& launch, unsigned char* room) {
  if (threadIdx.x == 0) new (room) StepScalars<T>(launch.scalars.values());
  __syncthreads();
  return *reinterpret_cast<const StepScalars<T>*>(room);
}

// An octet of the operands; those that are absent are zero.
template <typename T>
struct UpdateOctet {
  T theta[kOctet] = {}, slow[kOctet] = {}, forget[kOctet] = {}, retain[kOctet] = {};
};

template <bool forget, bool retain, bool interpolate, typename T>
__device__ __forceinline__ void load_operands(
    const Table& table, const UpdateLaunch& launch, int t, std::int64_t i, int n, UpdateOctet<T>& x) {
  constexpr Storage state_storage = sizeof(T) == 8 ? Storage::f64 : Storage::f32;
  load_values(table.storage(launch.weights_storage, t), table.pointer(launch.weights, t), i, n, x.theta);
  if constexpr (interpolate) load_values(state_storage, table.pointer(launch.slow, t), i, n, x.slow);
  if constexpr (forget)
    load_values(table.storage(launch.forget_storage, t), table.pointer(launch.forget, t), i, n, x.forget);
  if constexpr (retain)
    load_values(table.storage(launch.retain_storage, t), table.pointer(launch.retain, t), i, n, x.retain);
}

template <bool forget, bool retain, bool interpolate, typename T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ UpdateLaunch launch) {
  alignas(StepScalars<T>) __shared__ unsigned char room[sizeof(StepScalars<T>)];
  const StepScalars<T>& s = shared_scalars<T>(launch, room);
  const int t = table.tensor_of(blockIdx.x);
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    UpdateOctet<T> x;
    load_operands<forget, retain, interpolate>(table, launch, t, i, n, x);
    const std::uint32_t mask = launch.bits >= 0 ? load_mask(table.pointer(launch.bits, t), i) : 0xffu;
    const std::uint32_t keep_retain = launch.mask_retain ? mask : 0xffu;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const WeightState<T> before{x.theta[k], T(0), T(0), x.slow[k]};
      x.theta[k] =
          update_weight<Rule::sgd, forget, retain, interpolate>(
              before, x.forget[k], x.retain[k], lane_mask<T>(mask, k), lane_mask<T>(keep_retain, k), ~bits_t<T>(0), s)
              .theta;
    }
    round_and_store(table.storage(launch.weights_storage, t), table.pointer(launch.to_weights, t), i, n, x.theta);
  });
}

// Without sums no operand is read but the gradient that comes in.
template <bool forget, bool retain, bool interpolate, typename T>
__global__ void __launch_bounds__(kThreads, 2) differentiate_kernel(
    const __grid_constant__ Table table, const __grid_constant__ UpdateLaunch launch, UpdateSums* partials) {
  alignas(StepScalars<T>) __shared__ unsigned char room[sizeof(StepScalars<T>)];
  __shared__ UpdateSums sums[kThreads];
  const StepScalars<T>& s = shared_scalars<T>(launch, room);
  const int t = table.tensor_of(blockIdx.x);
  UpdateSums thread_sums;
  for_each_octet(table, t, [&](std::int64_t i, int n) {
    T d[kOctet];
    load_values(table.storage(launch.grad_output_storage, t), table.pointer(launch.grad_output, t), i, n, d);
    UpdateOctet<T> x;
    if (launch.sums) load_operands<forget, retain, interpolate>(table, launch, t, i, n, x);
    const std::uint32_t mask = launch.bits >= 0 ? load_mask(table.pointer(launch.bits, t), i) : 0xffu;
    const std::uint32_t keep_retain = launch.mask_retain ? mask : 0xffu;
    // The gradients take the operands' places, which are not needed any more.
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const WeightState<T> before{x.theta[k], T(0), T(0), x.slow[k]};
      const UpdateGradient<T> gradient = update_gradient<forget, retain, interpolate>(
          d[k], before, x.forget[k], x.retain[k], lane_mask<T>(mask, k), lane_mask<T>(keep_retain, k), s);
      x.theta[k] = gradient.theta;
      x.slow[k] = gradient.slow;
      x.forget[k] = gradient.forget;
      x.retain[k] = gradient.retain;
      thread_sums.add(gradient.terms);
    }
    if (launch.to_weights >= 0) {
      round_and_store(table.storage(launch.weights_storage, t), table.pointer(launch.to_weights, t), i, n, x.theta);
    }
    if constexpr (interpolate) {
      if (launch.to_slow >= 0) store_octet(table.pointer(launch.to_slow, t), i, n, x.slow);
    }
    if constexpr (forget) {
      if (launch.to_forget >= 0) {
        round_and_store(table.storage(launch.forget_storage, t), table.pointer(launch.to_forget, t), i, n, x.forget);
      }
    }
    if constexpr (retain) {
      if (launch.to_retain >= 0) {
        round_and_store(table.storage(launch.retain_storage, t), table.pointer(launch.to_retain, t), i, n, x.retain);
      }
    }
  });
  if (!launch.sums) return;
  sums[threadIdx.x] = thread_sums;
  for (int stride = 1; stride < kThreads; stride *= 2) {
    __syncthreads();
    if (threadIdx.x % (2 * stride) == 0) sums[threadIdx.x].add(sums[threadIdx.x + stride]);
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = sums[0];
}

__global__ void scalar_gradients_kernel(
    const UpdateSums* sums, bool stepped, bool interpolate, const __grid_constant__ ScalarSource scalars, double* out) {
  if (threadIdx.x == 0) update_scalar_gradients(*sums, stepped, interpolate, scalars.values(), out);
}

using UpdateKernel = void (*)(Table, UpdateLaunch);
using DifferentiateKernel = void (*)(Table, UpdateLaunch, UpdateSums*);

// Kernels of the opmath type and the parts that a call has.
UpdateKernel select_update(const UpdateCall& call, bool f64) {
  return with_parts(
      !call.forget.empty(), !call.retain.empty(), !call.slow.empty(),
      [f64](auto forget, auto retain, auto interpolate) -> UpdateKernel {
        return f64 ? update_kernel<forget.value, retain.value, interpolate.value, double>
                   : update_kernel<forget.value, retain.value, interpolate.value, float>;
      });
}

DifferentiateKernel select_differentiate(const UpdateCall& call, bool f64) {
  return with_parts(
      !call.forget.empty(), !call.retain.empty(), !call.slow.empty(),
      [f64](auto forget, auto retain, auto interpolate) -> DifferentiateKernel {
        return f64 ? differentiate_kernel<forget.value, retain.value, interpolate.value, double>
                   : differentiate_kernel<forget.value, retain.value, interpolate.value, float>;
      });
}

UpdateLaunch launch_of(const UpdateCall& call) {
  UpdateLaunch launch{};
  launch.scalars = source_of(call.scalars, call.weights[0]);
  launch.mask_retain = call.mask_retain;
  launch.grad_output = launch.to_weights = launch.to_forget = launch.to_retain = launch.to_slow = -1;
  launch.weights_storage = 0;
  launch.forget_storage = 1;
  launch.retain_storage = launch.forget_storage + !call.forget.empty();
  launch.grad_output_storage = launch.retain_storage + !call.retain.empty();
  return launch;
}

void update_into(const UpdateCall& call, const TensorList& results) {
  const OnDevice device(call.weights[0]);
  const RawList weights(call.weights), slow(call.slow), forget(call.forget), retain(call.retain), bits(call.bits);
  const RawList out(results);
  UpdateLaunch launch = launch_of(call);
  Columns columns;
  launch.weights = columns.add(weights, /*mixed=*/true);
  launch.forget = columns.add(forget, /*mixed=*/true);
  launch.retain = columns.add(retain, /*mixed=*/true);
  launch.slow = columns.add(slow);
  launch.bits = columns.add(bits);
  launch.to_weights = columns.add(out);
  const auto sizes = sizes_of(call.weights);
  for (const bool f64 : {false, true}) {
    const UpdateKernel kernel = select_update(call, f64);
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return (weights.dtype[t] == ScalarType::Double) == f64; },
        [&](const Table& table) { device.launch("update", kernel, table.units, table, launch); });
  }
}

void differentiate_update(const UpdateCall& call, const TensorList& grad_outputs, const UpdateGradients& gradients) {
  const char* op = "update_backward";
  const OnDevice device(call.weights[0]);
  const RawList weights(call.weights), slow(call.slow), forget(call.forget), retain(call.retain), bits(call.bits);
  const RawList grad_output(grad_outputs), to_weights(gradients.weights), to_slow(gradients.slow);
  const RawList to_forget(gradients.forget), to_retain(gradients.retain);
  UpdateLaunch launch = launch_of(call);
  launch.sums = gradients.scalars.numel() != 0;
  Columns columns;
  launch.weights = columns.add(weights, /*mixed=*/true);
  launch.forget = columns.add(forget, /*mixed=*/true);
  launch.retain = columns.add(retain, /*mixed=*/true);
  launch.grad_output = columns.add(grad_output, /*mixed=*/true);
  launch.slow = columns.add(slow);
  launch.bits = columns.add(bits);
  launch.to_weights = columns.add(to_weights);
  launch.to_forget = columns.add(to_forget);
  launch.to_retain = columns.add(to_retain);
  launch.to_slow = columns.add(to_slow);

  const auto sizes = sizes_of(call.weights);
  std::int64_t blocks = 0;
  for (const std::int64_t size : sizes) blocks += chunks_of(size);
  Partials<UpdateSums> partials(call.weights[0], launch.sums ? std::max<std::int64_t>(blocks, 1) : 0);
  if (launch.sums && blocks == 0) device.zero(op, partials.data(), sizeof(UpdateSums));
  UpdateSums* next = partials.data();
  for (const bool f64 : {false, true}) {
    const DifferentiateKernel kernel = select_differentiate(call, f64);
    columns.for_each_table(
        sizes, chunks_of, [&](size_t t) { return (weights.dtype[t] == ScalarType::Double) == f64; },
        [&](const Table& table) {
          device.launch(op, kernel, table.units, table, launch, next);
          if (launch.sums) next += table.units;
        });
  }
  if (!launch.sums) return;
  Tensor sum = empty_flat(call.weights[0], sizeof(UpdateSums) / sizeof(double), ScalarType::Double);
  UpdateSums* total = static_cast<UpdateSums*>(sum.data_ptr());
  partials.combine(device, op, total);
  // The scalars' gradients belong where the scalars are.
  Tensor on_device = empty_flat(call.weights[0], kScalarCount, ScalarType::Double);
  device.launch(
      op, scalar_gradients_kernel, 1, static_cast<const UpdateSums*>(total), call.stepped(), !call.slow.empty(),
      launch.scalars, static_cast<double*>(on_device.data_ptr()));
  Tensor result = gradients.scalars;
  torch::stable::copy_(result, on_device);
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, UNLEARN_CUDA_KEY, m) {
  m.impl("update", TORCH_BOX(&unlearn::update<&unlearn::update_into>));
  m.impl("update_backward", TORCH_BOX(&unlearn::update_backward<&unlearn::differentiate_update>));
}
