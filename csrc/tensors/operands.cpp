#include "operands.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

#include "../math/bits.h"

namespace unlearn {
namespace {

bool same_shape(const TensorInfo& a, const TensorInfo& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

// Equal up to the strides of dimensions that hold one element, which address nothing.
bool same_strides(const TensorInfo& a, const TensorInfo& b) {
  for (std::int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

bool is_contiguous(const TensorInfo& info) {
  std::int64_t expected = 1;
  for (std::int64_t d = info.dim - 1; d >= 0; --d) {
    if (info.sizes[d] != 1 && info.strides[d] != expected) return info.numel == 0;
    expected *= info.sizes[d];
  }
  return true;
}

// (stride, size) of the dimensions that address something, innermost first.
std::vector<std::pair<std::int64_t, std::int64_t>> dimensions_by_stride(const TensorInfo& info) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::int64_t d = 0; d < info.dim; ++d) {
    if (info.sizes[d] != 1) dims.emplace_back(info.strides[d], info.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Two elements may share an address. Conservative for exotic views made with as_strided, exact for slices,
// transposes and expansions.
bool may_overlap_itself(const TensorInfo& info) {
  if (info.numel < 2) return false;
  std::int64_t reach = 0; // the farthest offset that the dimensions seen so far address
  for (const auto& [stride, size] : dimensions_by_stride(info)) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

bool is_dense(const TensorInfo& info) {
  if (info.numel < 2 || is_contiguous(info)) return true;
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dimensions_by_stride(info)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

struct WrittenRange {
  std::uintptr_t begin, end;
  const char* argument;
  size_t index;
};

bool is_state_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

bool is_weight_dtype(ScalarType dtype) {
  return is_state_dtype(dtype) || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

std::string dtype_in_words(ScalarType dtype) {
  return std::string("dtype ") + torch::headeronly::toString(dtype);
}

std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "a CPU tensor" : "a tensor on device index " + std::to_string(tensor.get_device_index());
}

} // namespace

const Dtypes kWeightDtypes{is_weight_dtype, "dtype Double, Float, BFloat16 or Half"};
const Dtypes kStateDtypes{is_state_dtype, "dtype Float or Double"};
const Dtypes kBool{[](ScalarType dtype) { return dtype == ScalarType::Bool; }, "dtype Bool"};
const Dtypes kInt{[](ScalarType dtype) { return dtype == ScalarType::Int; }, "dtype Int"};

TensorInfo::TensorInfo(const Tensor& tensor)
    : data(static_cast<char*>(tensor.data_ptr())), dim(tensor.dim()), numel(tensor.numel()), dtype(dtype_of(tensor)) {
  std::int64_t *own_sizes = nullptr, *own_strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &own_sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &own_strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  sizes = own_sizes;
  strides = own_strides;
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

bool is_dense(const Tensor& tensor) {
  return is_dense(TensorInfo(tensor));
}

std::vector<std::int64_t> dense_strides(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> order(sizes.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = order.size() - 1 - d;
  // torch's own rule: an insertion sort in which a stride of 0, as expand() gives, compares with nothing.
  for (size_t i = 1; i < order.size(); ++i) {
    size_t moving = i;
    for (size_t k = i; k-- > 0;) {
      const auto inner = strides[order[k]], outer = strides[order[moving]];
      if (inner == 0 || outer == 0) continue;
      if (inner < outer || (inner == outer && sizes[order[k]] <= sizes[order[moving]])) break;
      std::swap(order[k], order[moving]);
      moving = k;
    }
  }
  std::vector<std::int64_t> dense(sizes.size());
  std::int64_t next = 1;
  for (size_t d : order) {
    dense[d] = next;
    next *= std::max<std::int64_t>(sizes[d], 1);
  }
  return dense;
}

Tensor empty_flat(const Tensor& like, std::int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size}, dtype);
}

Tensor empty_words(const Tensor& like) {
  return empty_flat(like, word_count(like.numel()), ScalarType::Int);
}

Tensor empty_strided(const Tensor& like, const std::vector<std::int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  std::int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto shim_dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), strides.data(), shim_dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_in_order(const Tensor& like, ScalarType dtype) {
  const auto strides = like.strides();
  return empty_strided(
      like, is_dense(like) ? std::vector<std::int64_t>(strides.begin(), strides.end()) : dense_strides(like), dtype);
}

void fail(const std::string& message) {
  throw std::runtime_error(message);
}

Operands::Operands(const char* op, const char* name, TensorList& reference)
    : op_(op), name_(name), reference_(reference), reference_infos_(reference.begin(), reference.end()) {}

void Operands::fail_at(const char* argument, size_t index, const std::string& expected, const std::string& got) const {
  fail(std::string(op_) + ": " + argument + "[" + std::to_string(index) + "]: expected " + expected + ", got " + got);
}

void Operands::check_length(NamedList list, bool may_be_absent) const {
  const auto& [argument, tensors] = list;
  if (tensors->size() == reference_.size() || (may_be_absent && tensors->empty())) return;
  fail(
      std::string(op_) + ": " + argument + ": expected " + std::to_string(reference_.size()) +
      " tensors (one for each of " + name_ + ")" + (may_be_absent ? " or none" : "") + ", got " +
      std::to_string(tensors->size()));
}

void Operands::check_device(NamedList list) {
  const auto& [argument, tensors] = list;
  const auto& infos = infos_of(*tensors);
  const TensorInfo& home = reference_infos_[0];
  for (size_t i = 0; i < infos.size(); ++i) {
    if (infos[i].device_type != home.device_type || infos[i].device_index != home.device_index) {
      fail_at(argument, i, device_of(reference_[0]) + " as " + name_ + "[0] is", device_of((*tensors)[i]));
    }
  }
}

void Operands::check_list(NamedList list, Dtypes dtypes, bool may_be_absent) {
  const auto& [argument, tensors] = list;
  check_length(list, may_be_absent);
  const auto& infos = infos_of(*tensors);
  for (size_t i = 0; i < infos.size(); ++i) {
    if (!same_shape(infos[i], reference_infos_[i])) {
      fail_at(argument, i, "shape " + shape_of(reference_[i]) + " as " + name_ + " has", shape_of((*tensors)[i]));
    }
    if (!dtypes.holds(infos[i].dtype)) fail_at(argument, i, dtypes.words, dtype_in_words(infos[i].dtype));
  }
  check_device(list);
}

void Operands::check_state(NamedList list, bool required) {
  check_list(list, kStateDtypes, !required);
  const auto& [argument, tensors] = list;
  const auto& infos = infos_of(*tensors);
  for (size_t i = 0; i < infos.size(); ++i) {
    const bool f64 = reference_infos_[i].dtype == ScalarType::Double;
    if ((infos[i].dtype == ScalarType::Double) != f64) {
      fail_at(
          argument, i, f64 ? "dtype Double, as its weight is Double" : "dtype Float", dtype_in_words(infos[i].dtype));
    }
  }
}

void Operands::check_bits(NamedList list, bool may_be_absent) {
  const auto& [argument, bits] = list;
  check_length(list, may_be_absent);
  const auto& infos = infos_of(*bits);
  for (size_t i = 0; i < infos.size(); ++i) {
    const TensorInfo& info = infos[i];
    const std::int64_t words = word_count(reference_infos_[i].numel);
    if (info.dtype != ScalarType::Int || info.dim != 1 || info.numel != words || !is_contiguous(info)) {
      fail_at(
          argument, i, "contiguous words of dtype Int and shape [" + std::to_string(words) + "]",
          dtype_in_words(info.dtype) + " and shape " + shape_of((*bits)[i]));
    }
  }
  check_device(list);
}

void Operands::check_writable(std::initializer_list<NamedList> lists) {
  std::vector<WrittenRange> ranges;
  for (const auto& [argument, list] : lists) {
    const auto& infos = infos_of(*list);
    for (size_t i = 0; i < infos.size(); ++i) {
      const TensorInfo& info = infos[i];
      if (info.numel == 0) continue;
      if (!is_dense(info) && may_overlap_itself(info)) {
        fail_at(argument, i, "a tensor whose elements do not share memory", "an expanded or overlapping view");
      }
      std::int64_t reach = 1;
      for (std::int64_t d = 0; d < info.dim; ++d) reach += (info.sizes[d] - 1) * info.strides[d];
      const auto begin = reinterpret_cast<std::uintptr_t>(info.data);
      ranges.push_back({begin, begin + reach * (*list)[i].element_size(), argument, i});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    const WrittenRange &before = ranges[i - 1], &range = ranges[i];
    if (range.begin < before.end) {
      fail_at(
          range.argument, range.index, "memory of its own",
          std::string("a range of memory that overlaps ") + before.argument + "[" + std::to_string(before.index) + "]");
    }
  }
}

void Operands::make_reference_dense(bool written) {
  for (size_t i = 0; i < reference_.size(); ++i) {
    if (!is_dense(reference_infos_[i])) replace(reference_, i, dense_strides(reference_[i]), written);
  }
}

void Operands::align(TensorList& list, bool written) {
  const auto& infos = infos_of(list);
  for (size_t i = 0; i < list.size(); ++i) {
    const TensorInfo& reference = reference_infos_[i];
    if (infos[i].numel == 0 || same_strides(infos[i], reference)) continue;
    replace(list, i, std::vector<std::int64_t>(reference.strides, reference.strides + reference.dim), written);
  }
}

void Operands::write_back() {
  for (auto& [original, copy] : written_copies_) torch::stable::copy_(original, copy);
}

std::vector<TensorInfo>& Operands::infos_of(const TensorList& list) {
  if (&list == &reference_) return reference_infos_;
  for (auto& [known, infos] : infos_) {
    if (known == &list) return infos;
  }
  return infos_.emplace_back(&list, std::vector<TensorInfo>(list.begin(), list.end())).second;
}

void Operands::replace(TensorList& list, size_t index, const std::vector<std::int64_t>& strides, bool written) {
  Tensor& tensor = list[index];
  Tensor copy = empty_strided(tensor, strides, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  if (written) written_copies_.emplace_back(tensor, copy);
  tensor = copy;
  infos_of(list)[index] = TensorInfo(copy);
}

} // namespace unlearn
