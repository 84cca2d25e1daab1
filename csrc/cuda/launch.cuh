// From lists to launches: the table is filled, and each full one is launched on the current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../math/step.h"
#include "../tensors/operands.h"
#include "table.cuh"

// The dispatch key of the kernels here. The tests compile them for the host, under another.
#ifndef UNLEARN_CUDA_KEY
#define UNLEARN_CUDA_KEY CUDA
#endif

namespace unlearn {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a tensor's device the current one for as long as it lives, and knows that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    const std::int32_t index = tensor.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, reinterpret_cast<void**>(&stream_)));
  }
  ~OnDevice() {
    aoti_torch_delete_cuda_guard(guard_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  template <typename... Expected, typename... Arguments>
  void launch(const char* op, void (*kernel)(Expected...), std::uint32_t blocks, Arguments&&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
  }

  void zero(const char* op, void* memory, size_t bytes) const {
    check_cuda(cudaMemsetAsync(memory, 0, bytes, stream_), op);
  }
  void zero(const char* op, const Tensor& tensor) const {
    zero(op, tensor.data_ptr(), size_t(tensor.numel()) * size_t(tensor.element_size()));
  }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

// The scalars of a step. On the device they are read there, so that no step waits for them; from the host they travel
// with the launch.
struct ScalarSource {
  const double* device;
  double host[kScalarCount];

  UNLEARN_INLINE const double* values() const {
    return device ? device : host;
  }
};

inline ScalarSource source_of(const Tensor& scalars, const Tensor& weight) {
  ScalarSource source{};
  const double* values = static_cast<const double*>(scalars.data_ptr());
  if (scalars.device() == weight.device()) {
    source.device = values;
  } else {
    for (int k = 0; k < kScalarCount; ++k) source.host[k] = values[k];
  }
  return source;
}

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      return Storage::f32;
  }
}

// Operands as columns of a table. Lists that are absent are left out; the kernels know from their parameters.
class Columns {
 public:
  // mixed: the column's dtype is looked up for each tensor, in the order in which mixed columns are added. Returns the
  // column's place, or -1 for a list that is absent.
  int add(const RawList& list, bool mixed = false) {
    if (list.empty()) return -1;
    if (mixed) mixed_.push_back(&list);
    lists_.push_back(&list);
    return int(lists_.size()) - 1;
  }

  // Calls launch(table) as often as the list needs. units(size): how much work a tensor is; chosen(t): whether tensor
  // t takes part at all.
  template <typename Units, typename Chosen, typename Launch>
  void for_each_table(
      const std::vector<std::int64_t>& sizes, const Units& units, const Chosen& chosen, const Launch& launch) const {
    Table table;
    table.columns = std::uint32_t(lists_.size());
    table.capacity = std::uint32_t(Table::capacity_for(int(lists_.size())));
    const auto flush = [&] {
      if (table.tensors > 0) launch(table);
      table.tensors = table.units = 0;
    };
    if (sizes.size() >> Table::kIndexBits) {
      fail("expected a list of at most 16,777,215 tensors, got " + std::to_string(sizes.size()));
    }
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (sizes[t] == 0 || !chosen(t)) continue;
      const std::int64_t work = units(sizes[t]);
      if (table.tensors == table.capacity || std::int64_t(table.units) + work > 0x7fffffff) flush();
      std::uint64_t rest = std::uint64_t(table.units) << 32 | std::uint64_t(t) << (2 * Table::kMixed);
      for (size_t k = 0; k < mixed_.size(); ++k) rest |= std::uint64_t(storage_of(mixed_[k]->dtype[t])) << (2 * k);
      for (size_t c = 0; c < lists_.size(); ++c) {
        table.words[c * table.capacity + table.tensors] = reinterpret_cast<std::uintptr_t>(lists_[c]->data[t]);
      }
      table.words[table.columns * table.capacity + table.tensors] = std::uint64_t(sizes[t]);
      table.words[(table.columns + 1) * table.capacity + table.tensors] = rest;
      table.units += std::uint32_t(work);
      ++table.tensors;
    }
    flush();
  }

 private:
  std::vector<const RawList*> lists_, mixed_;
};

inline std::int64_t chunks_of(std::int64_t size) {
  return (size + kChunk - 1) / kChunk;
}

inline bool every_tensor(size_t) {
  return true;
}

} // namespace unlearn
