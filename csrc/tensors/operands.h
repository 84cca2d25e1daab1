// The lists of one operator call: one validator, and one way to bring them into a common memory order.
//
// Everything is checked before anything is allocated or written. Errors name operator, argument, index, what was
// expected and what was got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace unlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Throws what PyTorch shows as a RuntimeError with exactly this message.
[[noreturn]] void fail(const std::string& message);

inline ScalarType dtype_of(const Tensor& tensor) {
  // The interface knows dtypes by numbers of its own, and its way back from them tries one after the other.
  static const std::int32_t single = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                            half = aoti_torch_dtype_float16(), word = aoti_torch_dtype_int32();
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == single) return ScalarType::Float;
  if (dtype == bfloat16) return ScalarType::BFloat16;
  if (dtype == half) return ScalarType::Half;
  if (dtype == word) return ScalarType::Int;
  return tensor.scalar_type();
}

// What a tensor is, read once: every question crosses the stable interface, and with hundreds of small tensors the
// crossings cost more than the mathematics.
struct TensorInfo {
  explicit TensorInfo(const Tensor& tensor);

  char* data;
  const std::int64_t *sizes, *strides; // the tensor's own
  std::int64_t dim, numel;
  std::int32_t device_type, device_index;
  ScalarType dtype;
};

// Every address of the tensor's range is used exactly once, in whatever order of dimensions.
bool is_dense(const Tensor& tensor);

// The strides of a dense tensor with the same order of dimensions, as torch.empty_like gives a non-dense one.
std::vector<std::int64_t> dense_strides(const Tensor& tensor);

// Uninitialised, flat, on the device of `like`.
Tensor empty_flat(const Tensor& like, std::int64_t size, ScalarType dtype);

// Uninitialised words for one bit of each element, on the tensor's device.
Tensor empty_words(const Tensor& like);

// Uninitialised, with the shape and device of `like`.
Tensor empty_strided(const Tensor& like, const std::vector<std::int64_t>& strides, ScalarType dtype);

// Uninitialised, with the shape, device and memory order of `like`, and its strides where it is dense.
Tensor empty_in_order(const Tensor& like, ScalarType dtype);

std::string shape_of(const Tensor& tensor);

// Raw data of a list, read once per call: going through the stable interface in the inner loop would cost more
// than the mathematics of a small tensor.
struct RawList {
  std::vector<char*> data;
  std::vector<ScalarType> dtype;

  explicit RawList(const TensorList& list) {
    data.reserve(list.size());
    dtype.reserve(list.size());
    for (const Tensor& tensor : list) {
      data.push_back(static_cast<char*>(tensor.data_ptr()));
      dtype.push_back(dtype_of(tensor));
    }
  }
  bool empty() const {
    return data.empty();
  }
  template <typename T>
  T* at(size_t tensor, std::int64_t begin) const {
    return reinterpret_cast<T*>(data[tensor]) + begin;
  }
};

inline std::vector<std::int64_t> sizes_of(const TensorList& list) {
  std::vector<std::int64_t> sizes;
  sizes.reserve(list.size());
  for (const Tensor& tensor : list) sizes.push_back(tensor.numel());
  return sizes;
}

// A set of dtypes and its name in error messages.
struct Dtypes {
  bool (*holds)(ScalarType);
  const char* words;
};
extern const Dtypes kWeightDtypes; // Double, Float, BFloat16, Half
extern const Dtypes kStateDtypes;  // Double, Float
extern const Dtypes kBool;
extern const Dtypes kInt;

// A list and its name in error messages.
using NamedList = std::pair<const char*, TensorList*>;

class Operands {
 public:
  // The reference list gives shapes and memory order to all others.
  Operands(const char* op, const char* name, TensorList& reference);

  // One tensor of equal shape on the same device for each of the reference list; or none, if that is allowed.
  void check_list(NamedList list, Dtypes dtypes, bool may_be_absent = true);

  // Moments and slow weights: float64 for float64 weights, float32 for all others.
  void check_state(NamedList list, bool required);

  // One contiguous int32 tensor of ceil(n / 32) words each, or none.
  void check_bits(NamedList bits, bool may_be_absent = true);

  // No two of the tensors that will be written may overlap, from their first to their last element: slices that
  // interleave are refused as well.
  void check_writable(std::initializer_list<NamedList> lists);

  // After the checks: makes the reference list dense. Copies stand in for views with gaps until write_back().
  void make_reference_dense(bool written);

  // Brings a list into the reference's memory order; copies stand in where the strides differ.
  void align(TensorList& list, bool written);

  void write_back();

 private:
  [[noreturn]] void fail_at(
      const char* argument, size_t index, const std::string& expected, const std::string& got) const;
  void check_length(NamedList list, bool may_be_absent) const;
  void check_device(NamedList list);
  std::vector<TensorInfo>& infos_of(const TensorList& list);
  void replace(TensorList& list, size_t index, const std::vector<std::int64_t>& strides, bool written);

  const char* op_;
  const char* name_;
  TensorList& reference_;
  std::vector<TensorInfo> reference_infos_;
  std::deque<std::pair<const TensorList*, std::vector<TensorInfo>>> infos_; // of the other lists
  std::vector<std::pair<Tensor, Tensor>> written_copies_;                   // original, copy
};

} // namespace unlearn
