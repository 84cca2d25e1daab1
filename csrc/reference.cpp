// The mathematics of math/ in float64 on NumPy arrays, as a Python module: for tests, teaching and notebooks.
//
// It has no lists, chunks, dtypes or threads, so a difference between it and an operator is a fault in those. Built
// on request by unlearn_ext.native.loading.build_reference(); arrays are C-contiguous float64, bits uint32.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "math/bits.h"
#include "math/reduce.h"
#include "math/rounding.h"
#include "math/saliency.h"
#include "math/step.h"
#include "operators/dispatch.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<double, py::array::c_style>;
using Words = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;
using MaybeArray = std::optional<Array>;

void expect_size(const char* name, py::ssize_t got, py::ssize_t expected) {
  if (got != expected) {
    throw std::invalid_argument(
        std::string(name) + ": expected " + std::to_string(expected) + " numbers, got " + std::to_string(got));
  }
}

double* data_of(const char* name, MaybeArray& array, py::ssize_t size) {
  if (!array) return nullptr;
  expect_size(name, array->size(), size);
  return array->mutable_data();
}

bool bit(const Words* words, py::ssize_t i) {
  return !words || ((words->data()[i / 32] >> (i % 32)) & 1u);
}

template <unlearn::Rule rule, bool forget, bool retain, bool interpolate>
unlearn::WeightState<double> updated(
    const unlearn::WeightState<double>& w, double f, double r, bool keep, bool mask_retain, bool protect,
    const unlearn::StepScalars<double>& s) {
  const auto all = [](bool set) { return set ? ~std::uint64_t(0) : std::uint64_t(0); };
  return unlearn::update_weight<rule, forget, retain, interpolate>(
      w, f, r, all(keep), all(keep || !mask_retain), all(keep || !protect), s);
}

// The operator step_ on one array, in place.
void step(
    Array theta, Array scalars, int rule, MaybeArray forget, MaybeArray retain, MaybeArray slow, MaybeArray exp_avg,
    MaybeArray exp_avg_sq, std::optional<Words> bits, bool mask_retain, bool protect) {
  using unlearn::Rule;
  const py::ssize_t n = theta.size();
  expect_size("scalars", scalars.size(), unlearn::kScalarCount);
  double* f = data_of("forget_grad", forget, n);
  double* r = data_of("retain_grad", retain, n);
  double* z = data_of("slow", slow, n);
  double* m = data_of("first_moment", exp_avg, n);
  double* v = data_of("second_moment", exp_avg_sq, n);
  if (bits) expect_size("bits", bits->size(), unlearn::word_count(n));
  if (rule < 0 || rule > int(Rule::adamw)) throw std::invalid_argument("rule: expected 0 (sgd) to 3 (adamw)");
  if (!f && !r) throw std::invalid_argument("forget_grad, retain_grad: expected at least one");
  if (scalars.data()[unlearn::kSkip] != 0.0) return;
  const unlearn::StepScalars<double> s(scalars.data());
  const auto update =
      unlearn::with_step(Rule(rule), f, r, z, [](auto rule, auto forget, auto retain, auto interpolate) {
        return &updated<rule.value, forget.value, retain.value, interpolate.value>;
      });
  const Words* words = bits ? &*bits : nullptr;
  for (py::ssize_t i = 0; i < n; ++i) {
    unlearn::WeightState<double> w{theta.data()[i], m ? m[i] : 0, v ? v[i] : 0, z ? z[i] : 0};
    w = update(w, f ? f[i] : 0, r ? r[i] : 0, bit(words, i), mask_retain, protect, s);
    theta.mutable_data()[i] = w.theta;
    if (m) m[i] = w.exp_avg;
    if (v) v[i] = w.exp_avg_sq;
    if (z) z[i] = w.slow;
  }
}

// Gradients of a plain step's operands (none for those that are absent) and of its scalars.
py::tuple update_gradient(
    Array grad_output, Array theta, Array scalars, MaybeArray forget, MaybeArray retain, MaybeArray slow,
    std::optional<Words> bits, bool mask_retain) {
  const py::ssize_t n = theta.size();
  expect_size("output_grad", grad_output.size(), n);
  expect_size("scalars", scalars.size(), unlearn::kScalarCount);
  const double* f = data_of("forget_grad", forget, n);
  const double* r = data_of("retain_grad", retain, n);
  const double* z = data_of("slow", slow, n);
  if (bits) expect_size("bits", bits->size(), unlearn::word_count(n));
  if (!f && !r) throw std::invalid_argument("forget_grad, retain_grad: expected at least one");
  const unlearn::StepScalars<double> s(scalars.data());
  const Words* words = bits ? &*bits : nullptr;
  Array d_theta(n), d_forget(n), d_retain(n), d_slow(n), d_scalars(unlearn::kScalarCount);
  std::vector<unlearn::UpdateSums> terms(size_t(n) + 1);
  for (py::ssize_t i = 0; i < n; ++i) {
    // An absent gradient is one of zero; without slow weights the interpolation is left out.
    const auto derive =
        z ? &unlearn::update_gradient<true, true, true, double> : &unlearn::update_gradient<true, true, false, double>;
    const auto all = [](bool set) { return set ? ~std::uint64_t(0) : std::uint64_t(0); };
    const bool keep = bit(words, i);
    const unlearn::UpdateGradient<double> gradient = derive(
        grad_output.data()[i], {theta.data()[i], 0, 0, z ? z[i] : 0}, f ? f[i] : 0, r ? r[i] : 0, all(keep),
        all(keep || !mask_retain), s);
    d_theta.mutable_data()[i] = gradient.theta;
    d_slow.mutable_data()[i] = gradient.slow;
    d_forget.mutable_data()[i] = gradient.forget;
    d_retain.mutable_data()[i] = gradient.retain;
    terms[size_t(i)] = gradient.terms;
  }
  unlearn::combine_in_fixed_order(terms.data(), std::int64_t(terms.size()));
  unlearn::update_scalar_gradients(terms[0], true, z != nullptr, scalars.data(), d_scalars.mutable_data());
  const auto if_present = [](bool present, const Array& array) { return present ? py::object(array) : py::none(); };
  return py::make_tuple(d_theta, if_present(z, d_slow), if_present(f, d_forget), if_present(r, d_retain), d_scalars);
}

Array gradient_products(Array forget, Array retain, std::optional<Words> bits, bool mask_retain) {
  expect_size("retain_grad", retain.size(), forget.size());
  std::vector<unlearn::Products> terms(size_t(forget.size()) + 1);
  const Words* words = bits ? &*bits : nullptr;
  for (py::ssize_t i = 0; i < forget.size(); ++i) {
    const auto all = [](bool set) { return set ? ~std::uint64_t(0) : std::uint64_t(0); };
    const bool keep = bit(words, i);
    unlearn::Products& term = terms[size_t(i)];
    unlearn::add_products<true, true>(
        forget.data()[i], retain.data()[i], all(keep), all(keep || !mask_retain), term.forget_square,
        term.retain_square, term.cross, term.non_finite);
  }
  unlearn::combine_in_fixed_order(terms.data(), std::int64_t(terms.size()));
  Array result(4);
  double* out = result.mutable_data();
  out[0] = terms[0].forget_square;
  out[1] = terms[0].retain_square;
  out[2] = terms[0].cross;
  out[3] = terms[0].non_finite;
  return result;
}

void accumulate_fisher(Array fisher, Array gradient, double weight) {
  expect_size("gradient", gradient.size(), fisher.size());
  for (py::ssize_t i = 0; i < fisher.size(); ++i) {
    fisher.mutable_data()[i] = unlearn::accumulate_fisher(fisher.data()[i], gradient.data()[i], weight);
  }
}

py::array_t<bool> salient(
    Array forget, Array retain, double gamma, double eps, double forget_scale, double retain_scale) {
  expect_size("retain_fisher", retain.size(), forget.size());
  py::array_t<bool> result(forget.size());
  for (py::ssize_t i = 0; i < forget.size(); ++i) {
    result.mutable_data()[i] =
        unlearn::is_salient(forget.data()[i], retain.data()[i], forget_scale, retain_scale, eps, gamma);
  }
  return result;
}

float bfloat16_nearest(float value) {
  return unlearn::bfloat16_to_float(unlearn::float_to_bfloat16(value));
}

float bfloat16_stochastic(float value, std::uint64_t seed, std::uint64_t tensor, std::uint64_t index) {
  const std::uint32_t noise = unlearn::rounding_noise(unlearn::rounding_stream(seed, tensor), index);
  return unlearn::bfloat16_to_float(unlearn::float_to_bfloat16_stochastic(value, noise));
}

} // namespace

PYBIND11_MODULE(reference, m) {
  m.doc() = "unlearn_ext's mathematics in float64 on NumPy arrays; see csrc/math.";
  // noconvert: an array of another dtype would be copied, and the copy updated.
  m.def(
      "step", &step, py::arg("theta").noconvert(), py::arg("scalars"), py::kw_only(), py::arg("rule"),
      py::arg("forget_grad") = py::none(), py::arg("retain_grad") = py::none(),
      py::arg("slow").noconvert() = py::none(), py::arg("first_moment").noconvert() = py::none(),
      py::arg("second_moment").noconvert() = py::none(), py::arg("bits") = py::none(), py::arg("mask_retain") = false,
      py::arg("protect") = false);
  m.def(
      "update_gradient", &update_gradient, py::arg("output_grad"), py::arg("theta"), py::arg("scalars"), py::kw_only(),
      py::arg("forget_grad") = py::none(), py::arg("retain_grad") = py::none(), py::arg("slow") = py::none(),
      py::arg("bits") = py::none(), py::arg("mask_retain") = false);
  m.def(
      "gradient_products", &gradient_products, py::arg("forget_grad"), py::arg("retain_grad"),
      py::arg("bits") = py::none(), py::arg("mask_retain") = false);
  m.def(
      "accumulate_fisher", &accumulate_fisher, py::arg("fisher").noconvert(), py::arg("gradient"),
      py::arg("weight") = 1.0);
  m.def(
      "salient", &salient, py::arg("forget_fisher"), py::arg("retain_fisher"), py::arg("gamma") = 1.0,
      py::arg("eps") = 1e-15, py::arg("forget_scale") = 1.0, py::arg("retain_scale") = 1.0);
  m.def("bfloat16_nearest", &bfloat16_nearest);
  m.def("bfloat16_stochastic", &bfloat16_stochastic);
}
