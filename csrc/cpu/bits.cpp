// pack_bits, unpack_bits, count_bits: between bool tensors and one bit per weight, in memory order.
#include "../math/bits.h"

#include "strips.h"

namespace unlearn {
namespace {

inline __attribute__((always_inline)) std::uint32_t pack_word(const std::uint8_t* __restrict flags, int lanes) {
  std::uint32_t word = 0;
  for (int i = 0; i < lanes; ++i) word |= std::uint32_t(flags[i] != 0) << i;
  return word;
}

TensorList pack_bits(TensorList masks) {
  if (masks.empty()) return {};
  Operands operands("pack_bits", "masks", masks);
  operands.check_list({"masks", &masks}, kBool);
  operands.make_reference_dense(/*written=*/false);
  TensorList bits;
  for (const Tensor& mask : masks) {
    bits.push_back(torch::stable::empty({word_count(mask.numel())}, ScalarType::Int));
  }
  const RawList from(masks), to(bits);
  const WorkRange work(sizes_of(masks));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t first, std::int64_t count) {
      const std::uint8_t* flags = from.at<std::uint8_t>(t, first);
      std::uint32_t* words = to.at<std::uint32_t>(t, 0) + first / kWordBits;
      for (std::int64_t done = 0; done < count; done += kWordBits) {
        words[done / kWordBits] = count - done >= kWordBits ? pack_word(flags + done, kWordBits)
                                                            : pack_word(flags + done, int(count - done));
      }
    });
  });
  return bits;
}

TensorList unpack_bits(TensorList bits, TensorList like) {
  if (bits.empty() && like.empty()) return {};
  Operands operands("unpack_bits", "like", like);
  operands.check_bits({"bits", &bits}, /*may_be_absent=*/false);
  TensorList masks;
  for (const Tensor& tensor : like) {
    const auto strides = tensor.strides();
    masks.push_back(empty_strided(
        tensor, is_dense(tensor) ? std::vector<int64_t>(strides.begin(), strides.end()) : dense_strides(tensor),
        ScalarType::Bool));
  }
  const RawList from(bits), to(masks);
  const WorkRange work(sizes_of(masks));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t first, std::int64_t count) {
      std::uint8_t* flags = to.at<std::uint8_t>(t, first);
      for (std::int64_t i = 0; i < count; ++i) {
        flags[i] = std::uint8_t((word_at(from, t, (first + i) / kWordBits) >> (i % kWordBits)) & 1u);
      }
    });
  });
  return masks;
}

Tensor count_bits(TensorList bits) {
  Operands operands("count_bits", "bits", bits);
  operands.check_list({"bits", &bits}, kInt);
  operands.make_reference_dense(/*written=*/false);
  Tensor counts = torch::stable::empty({std::int64_t(bits.size())}, ScalarType::Long);
  std::int64_t* out = counts.mutable_data_ptr<std::int64_t>();
  const RawList words(bits);
  torch::stable::parallel_for(0, std::int64_t(bits.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      std::int64_t sum = 0;
      const std::uint32_t* word = words.at<std::uint32_t>(size_t(t), 0);
      for (std::int64_t i = 0, n = bits[size_t(t)].numel(); i < n; ++i) sum += count_word(word[i]);
      out[t] = sum;
    }
  });
  return counts;
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&unlearn::pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unlearn::unpack_bits));
  m.impl("count_bits", TORCH_BOX(&unlearn::count_bits));
}
