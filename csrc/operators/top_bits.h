// top_bits: the mask of exactly the k weights of the largest scores in a whole list, as packed bits, and its counts.
#pragma once

#include <tuple>

#include "../math/saliency.h"
#include "../tensors/operands.h"

namespace unlearn {

struct TopOptions {
  std::int64_t k;
  Score score;
  double eps, forget_scale, retain_scale;
};

// run(scores, other, options, bits, counts): the backend's kernel; it writes every word and every count.
template <auto run>
std::tuple<TensorList, Tensor> top_bits(
    TensorList scores, TensorList other, std::int64_t k, std::int64_t score_code, double eps, double forget_scale,
    double retain_scale) {
  if (scores.empty()) fail("top_bits: scores: expected at least one tensor, got none");
  if (score_code < 0 || score_code > int(Score::ratio)) {
    fail("top_bits: score: expected 0 (value) to 3 (ratio), got " + std::to_string(score_code));
  }
  const Score score = Score(score_code);
  if (!takes_two(score) && !other.empty()) {
    fail("top_bits: other: expected no tensors for a score of one number, got " + std::to_string(other.size()));
  }
  Operands operands("top_bits", "scores", scores);
  operands.check_list({"scores", &scores}, kWeightDtypes);
  operands.check_list({"other", &other}, kWeightDtypes, /*may_be_absent=*/!takes_two(score));
  std::int64_t total = 0;
  for (const Tensor& tensor : scores) total += tensor.numel();
  if (k < 0 || k > total) {
    fail("top_bits: k: expected 0 to " + std::to_string(total) + ", the number of weights, got " + std::to_string(k));
  }
  operands.make_reference_dense(/*written=*/false);
  operands.align(other, /*written=*/false);

  TensorList bits;
  bits.reserve(scores.size());
  for (const Tensor& tensor : scores) bits.push_back(empty_words(tensor));
  Tensor counts = empty_flat(scores[0], std::int64_t(scores.size()), ScalarType::Long);
  run(scores, other, TopOptions{k, score, eps, forget_scale, retain_scale}, bits, counts);
  return {bits, counts};
}

} // namespace unlearn
