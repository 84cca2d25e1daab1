// pack_bits, unpack_bits and count_bits on the CPU.
#include "../operators/bits.h"

#include "../math/bits.h"

#include "strips.h"

namespace unlearn {
namespace {

inline __attribute__((always_inline)) std::uint32_t pack_word(const std::uint8_t* __restrict flags, int lanes) {
  std::uint32_t word = 0;
  for (int i = 0; i < lanes; ++i) word |= std::uint32_t(flags[i] != 0) << i;
  return word;
}

void pack_all(const TensorList& masks, const TensorList& bits) {
  const RawList from(masks), to(bits);
  const WorkRange work(sizes_of(masks));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      const std::uint8_t* flags = from.at<std::uint8_t>(t, begin);
      std::uint32_t* words = to.at<std::uint32_t>(t, 0) + begin / kWordBits;
      for (std::int64_t done = 0; done < count; done += kWordBits) {
        words[done / kWordBits] =
            count - done >= kWordBits ? pack_word(flags + done, kWordBits) : pack_word(flags + done, int(count - done));
      }
    });
  });
}

void unpack_all(const TensorList& bits, const TensorList& masks) {
  const RawList from(bits), to(masks);
  const WorkRange work(sizes_of(masks));
  for_each_block(work, [&](std::int64_t block) {
    work.visit_block(block, [&](size_t t, std::int64_t begin, std::int64_t count) {
      std::uint8_t* flags = to.at<std::uint8_t>(t, begin);
      for (std::int64_t i = 0; i < count; ++i) {
        flags[i] = std::uint8_t((word_at(from, t, (begin + i) / kWordBits) >> (i % kWordBits)) & 1u);
      }
    });
  });
}

void count_all(const TensorList& bits, const Tensor& counts) {
  std::int64_t* out = static_cast<std::int64_t*>(counts.data_ptr());
  const RawList words(bits);
  torch::stable::parallel_for(0, std::int64_t(bits.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      std::int64_t sum = 0;
      const std::uint32_t* word = words.at<std::uint32_t>(size_t(t), 0);
      for (std::int64_t i = 0, n = bits[size_t(t)].numel(); i < n; ++i) sum += count_word(word[i]);
      out[t] = sum;
    }
  });
}

} // namespace
} // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&unlearn::pack_bits<&unlearn::pack_all>));
  m.impl("unpack_bits", TORCH_BOX(&unlearn::unpack_bits<&unlearn::unpack_all>));
  m.impl("count_bits", TORCH_BOX(&unlearn::count_bits<&unlearn::count_all>));
}
