// From run-time flags to template parameters. A body is a generic lambda: what it is called with are constants of
// types like std::true_type, whose `value` may be a template argument.
#pragma once

#include <type_traits>

#include "../math/step.h"

namespace unlearn {

template <typename Body>
auto with_flag(bool flag, const Body& body) {
  return flag ? body(std::true_type()) : body(std::false_type());
}

// body(forget, retain): which gradients a call has. It has at least one.
template <typename Body>
auto with_gradients(bool forget, bool retain, const Body& body) {
  if (!forget) return body(std::false_type(), std::true_type());
  return with_flag(retain, [&](auto with_retain) { return body(std::true_type(), with_retain); });
}

// body(forget, retain, interpolate): the parts of an update. Without gradients it only interpolates.
template <typename Body>
auto with_parts(bool forget, bool retain, bool interpolate, const Body& body) {
  if (!forget && !retain) return body(std::false_type(), std::false_type(), std::true_type());
  return with_gradients(forget, retain, [&](auto with_forget, auto with_retain) {
    return with_flag(interpolate, [&](auto closes) { return body(with_forget, with_retain, closes); });
  });
}

// body(rule)
template <typename Body>
auto with_rule(Rule rule, const Body& body) {
  switch (rule) {
    case Rule::sgd:
      return body(std::integral_constant<Rule, Rule::sgd>());
    case Rule::momentum:
      return body(std::integral_constant<Rule, Rule::momentum>());
    case Rule::adam:
      return body(std::integral_constant<Rule, Rule::adam>());
    default:
      return body(std::integral_constant<Rule, Rule::adamw>());
  }
}

// body(rule, forget, retain, interpolate). The rule says nothing where a step only interpolates: sgd stands for all.
template <typename Body>
auto with_step(Rule rule, bool forget, bool retain, bool interpolate, const Body& body) {
  return with_parts(forget, retain, interpolate, [&](auto with_forget, auto with_retain, auto closes) {
    if constexpr (with_forget.value || with_retain.value) {
      return with_rule(rule, [&](auto chosen) { return body(chosen, with_forget, with_retain, closes); });
    } else {
      return body(std::integral_constant<Rule, Rule::sgd>(), with_forget, with_retain, closes);
    }
  });
}

} // namespace unlearn
