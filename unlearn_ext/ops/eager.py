"""The operators as PyTorch operations, for machines without a compiler and devices without a native kernel.

Same arguments, checks and meaning as the kernels, several times slower. The update rules are not written here a
second time: they are torch.optim's functional forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .checks import STATE, WEIGHTS, check_bits, check_list, check_scalars, check_state, check_writable, fail

Scalars: TypeAlias = dict[str, Any]  # by name, numbers or 0-d tensors

_SHIFTS = torch.arange(32, dtype=torch.int64, device="cpu")


def _at(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """An element of a list that may be absent."""
    return tensors[i] if tensors else None


def _memory_order(tensor: Tensor) -> Tensor:
    """A flat copy of a tensor's elements in its memory order."""
    dense = torch.empty_like(tensor).copy_(tensor)
    return dense.as_strided((tensor.numel(),), (1,))


def _sum_in_fixed_order(values: Tensor) -> Tensor:
    """Sums a flat tensor by rows of fixed length: torch.sum of the whole would depend on the thread count."""
    row = 4096
    while values.numel() > 1:
        values = torch.nn.functional.pad(values, (0, -values.numel() % row)).view(-1, row).sum(dim=1)
    return values.sum()


def pack_bits(masks: Sequence[Tensor]) -> list[Tensor]:
    check_list("pack_bits", "masks", masks, "masks", masks, (torch.bool,))
    words = []
    for mask in masks:
        flags = _memory_order(mask)
        lanes = torch.nn.functional.pad(flags, (0, -flags.numel() % 32)).view(-1, 32).long()
        word = (lanes << _SHIFTS.to(mask.device)).sum(dim=1)
        words.append(torch.where(word >= 2**31, word - 2**32, word).to(torch.int32))
    return words


def unpack_bits(bits: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    check_bits("unpack_bits", bits, "like", like, may_be_absent=False)
    masks = []
    for word, tensor in zip(bits, like, strict=True):
        flags = ((word.long().unsqueeze(1) >> _SHIFTS.to(word.device)) & 1).bool().flatten()[: tensor.numel()]
        mask = torch.empty_like(tensor, dtype=torch.bool)
        mask.as_strided((tensor.numel(),), (1,)).copy_(flags)
        masks.append(mask)
    return masks


def count_bits(bits: Sequence[Tensor]) -> Tensor:
    check_list("count_bits", "bits", bits, "bits", bits, (torch.int32,))
    counts = [((word.long().unsqueeze(-1) >> _SHIFTS.to(word.device)) & 1).sum() for word in bits]
    return torch.stack(counts)


def ratio_bits(
    forget_fisher: Sequence[Tensor],
    retain_fisher: Sequence[Tensor],
    gamma: float,
    eps: float,
    forget_scale: float,
    retain_scale: float,
) -> tuple[list[Tensor], Tensor]:
    op, reference = "ratio_bits", ("forget_fisher", forget_fisher)
    check_list(op, "forget_fisher", forget_fisher, *reference, STATE)
    check_list(op, "retain_fisher", retain_fisher, *reference, STATE, may_be_absent=False)
    masks = []
    for f, r in zip(forget_fisher, retain_fisher, strict=True):
        mask = torch.empty_like(f, dtype=torch.bool)
        masks.append(mask.copy_((f * forget_scale + eps) / (r * retain_scale + eps) >= gamma))
    return pack_bits(masks), torch.stack([mask.sum() for mask in masks])


def _scores(values: Tensor, other: Tensor | None, score: int, eps: float, scales: tuple[float, float]) -> Tensor:
    """Flat, in the memory order of ``values`` and the opmath type, with -0 as +0."""
    wide = torch.float64 in (values.dtype, values.dtype if other is None else other.dtype)
    values = torch.empty_like(values, dtype=torch.float64 if wide else torch.float32).copy_(values)
    if other is None:
        values = values.abs() if score == 1 else values
    elif score == 2:
        values = values.mul_(other).abs_()
    else:
        other = torch.empty_like(values).copy_(other)
        values = (values * scales[0] + eps) / (other * scales[1] + eps)
    return values.as_strided((values.numel(),), (1,)) + 0.0


def top_bits(
    scores: Sequence[Tensor],
    other: Sequence[Tensor],
    k: int,
    score: int,
    eps: float,
    forget_scale: float,
    retain_scale: float,
) -> tuple[list[Tensor], Tensor]:
    op = "top_bits"
    if score < 2 and other:
        fail(op, "other", "no tensors for a score of one number", str(len(other)))
    check_list(op, "scores", scores, "scores", scores, WEIGHTS)
    check_list(op, "other", other, "scores", scores, WEIGHTS, may_be_absent=score < 2)
    total = sum(s.numel() for s in scores)
    if not 0 <= k <= total:
        fail(op, "k", f"0 to {total}, the number of weights", str(k))
    scales = forget_scale, retain_scale
    flat = torch.cat([_scores(values, _at(other, i), score, eps, scales) for i, values in enumerate(scores)])
    order = flat.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
    order = order[flat[order].isnan().to(torch.uint8).sort(stable=True).indices]
    keep = torch.zeros(total, dtype=torch.bool, device=flat.device).index_fill_(0, order[:k], True)
    masks = torch.split(keep, [s.numel() for s in scores])
    return pack_bits(masks), torch.stack([mask.sum() for mask in masks])


def accumulate_fisher_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    op, reference = "accumulate_fisher_", ("fisher", fisher)
    check_list(op, "fisher", fisher, *reference, STATE)
    check_list(op, "grads", grads, *reference, WEIGHTS, may_be_absent=False)
    check_writable(op, fisher=fisher)
    for f, g in zip(fisher, grads, strict=True):
        g = g.to(f.dtype)
        f.addcmul_(g, g, value=weight)


def _kept(gradient: Tensor, bits: Tensor | None) -> Tensor:
    """The gradient with masked-out entries replaced by zero, whatever they held."""
    if bits is None:
        return gradient
    return torch.where(unpack_bits([bits], [gradient])[0], gradient, 0.0)


def gradient_products(
    forget_grads: Sequence[Tensor], retain_grads: Sequence[Tensor], bits: Sequence[Tensor], mask_retain: bool
) -> Tensor:
    op = "gradient_products"
    reference = ("forget_grads", forget_grads) if forget_grads else ("retain_grads", retain_grads)
    check_list(op, "forget_grads", forget_grads, *reference, WEIGHTS)
    check_list(op, "retain_grads", retain_grads, *reference, WEIGHTS)
    check_bits(op, bits, *reference)
    total = torch.zeros(4, dtype=torch.float64, device=reference[1][0].device)
    for i, like in enumerate(reference[1]):
        word = bits[i] if bits else None
        f = _kept(forget_grads[i], word) if forget_grads else None
        r = torch.empty_like(like, dtype=retain_grads[i].dtype).copy_(retain_grads[i]) if retain_grads else None
        if r is not None and mask_retain:
            r = _kept(r, word)
        flat = [None if g is None else _memory_order(g).double() for g in (f, r)]
        for k, (a, b) in enumerate(((0, 0), (1, 1), (0, 1))):
            left, right = flat[a], flat[b]
            if left is not None and right is not None:
                total[k] += _sum_in_fixed_order(left * right)
        total[3] += sum((~torch.isfinite(g)).sum() for g in flat if g is not None)
    return total


def _stochastic_bfloat16(values: Tensor, seed: int, index: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(hash((seed, index)) & (2**63 - 1))
    noise = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32, device="cpu")
    rounded = ((values.view(torch.int32) + noise.to(values.device)) & -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


def _apply_rule(rule: int, theta: Tensor, g: Tensor, moments: Sequence[Tensor | None], s: Scalars) -> None:
    first, second = ([] if moment is None else [moment] for moment in moments)
    if rule < 2:
        sgd(
            [theta],
            [g],
            [*first] if rule == 1 else [None],
            foreach=False,
            weight_decay=s["weight_decay"],
            momentum=s["momentum"] if rule == 1 else 0.0,
            lr=s["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        return
    (adam if rule == 2 else adamw)(
        [theta],
        [g],
        first,
        second,
        [],
        [torch.tensor(s["step"] - 1.0, dtype=torch.float64, device="cpu")],
        foreach=False,
        amsgrad=False,
        beta1=s["beta1"],
        beta2=s["beta2"],
        lr=s["lr"],
        weight_decay=s["weight_decay"],
        eps=s["eps"],
        maximize=False,
    )


def _combined_gradient(
    forget: Tensor | None,
    retain: Tensor | None,
    keep: Tensor | None,
    mask_retain: bool,
    s: Scalars,
    theta: Tensor,
) -> Tensor:
    """The weighted sum of what the masks keep of the two gradients, in the dtype of theta."""
    g = torch.zeros_like(theta)
    for gradient, part, masked in ((forget, "forget", True), (retain, "retain", mask_retain)):
        if gradient is not None:
            scaled = gradient.to(theta.dtype) * (s["inverse_scale"] * s[f"{part}_weight"] * s[f"{part}_clip"])
            g += torch.where(keep, scaled, 0.0) if masked and keep is not None else scaled
    return g


def step_(
    weights: Sequence[Tensor],
    slow: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    scalars: Tensor,
    rule: int,
    mask_retain: bool,
    protect: bool,
    rounding_seed: int,
) -> None:
    op, reference = "step_", ("weights", weights)
    s = check_scalars(op, scalars)
    stepped = bool(forget_grads or retain_grads)
    if not stepped and not slow:
        fail(op, "forget_grads, retain_grads", "at least one list of gradients", "none")
    if protect and not bits:
        fail(op, "protect", "bits that say what to protect", "none")
    for name, grads in (("weights", weights), ("forget_grads", forget_grads), ("retain_grads", retain_grads)):
        check_list(op, name, grads, *reference, WEIGHTS)
    check_state(op, "slow", slow, weights, required=False)
    check_state(op, "first_moments", first_moments, weights, required=stepped and rule >= 1)
    check_state(op, "second_moments", second_moments, weights, required=stepped and rule >= 2)
    check_bits(op, bits, *reference)
    check_writable(op, weights=weights, slow=slow, first_moments=first_moments, second_moments=second_moments)
    if s["skip"]:
        return
    for i, weight in enumerate(weights):
        opmath = torch.float64 if weight.dtype == torch.float64 else torch.float32
        keep = unpack_bits([bits[i]], [weight])[0] if bits else None
        theta = weight.to(opmath, copy=True)
        moments = [m[i].clone() if m and stepped else None for m in (first_moments, second_moments)]
        if stepped:
            g = _combined_gradient(_at(forget_grads, i), _at(retain_grads, i), keep, mask_retain, s, theta)
            _apply_rule(rule, theta, g, moments, s)
        results: list[tuple[Tensor | None, Tensor | None]] = [(weight, theta)]
        results += [(_at(first_moments, i), moments[0]), (_at(second_moments, i), moments[1])]
        if slow:
            theta.copy_(slow[i] + s["slow_rate"] * (theta - slow[i]))
            results.append((slow[i], theta.clone()))
        for target, value in results:
            if target is None or value is None:
                continue
            if target.dtype == torch.bfloat16 and rounding_seed >= 0:
                value = _stochastic_bfloat16(value, rounding_seed, i)
            if protect and keep is not None:
                value = torch.where(keep, value.to(target.dtype), target)
            target.copy_(value)


def _check_update(
    op: str,
    weights: Sequence[Tensor],
    slow: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[Tensor],
    bits: Sequence[Tensor],
) -> None:
    if not forget_grads and not retain_grads and not slow:
        fail(op, "forget_grads, retain_grads", "at least one list of gradients", "none")
    for name, tensors in (("weights", weights), ("forget_grads", forget_grads), ("retain_grads", retain_grads)):
        check_list(op, name, tensors, "weights", weights, WEIGHTS)
    check_state(op, "slow", slow, weights, required=False)
    check_bits(op, bits, "weights", weights)


def update(
    weights: Sequence[Tensor],
    slow: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    scalars: Tensor,
    mask_retain: bool,
) -> list[Tensor]:
    s = check_scalars("update", scalars)
    _check_update("update", weights, slow, forget_grads, retain_grads, bits)
    results = []
    for i, weight in enumerate(weights):
        theta = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
        if forget_grads or retain_grads:
            keep = unpack_bits([bits[i]], [weight])[0] if bits else None
            g = _combined_gradient(_at(forget_grads, i), _at(retain_grads, i), keep, mask_retain, s, theta)
            _apply_rule(0, theta, g, (None, None), s)
        if slow:
            theta = slow[i] + s["slow_rate"] * (theta - slow[i])
        results.append(torch.empty_like(weight).copy_(theta))
    return results


def update_backward(
    output_grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    slow: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    scalars: Tensor,
    mask_retain: bool,
    for_weights: bool,
    for_slow: bool,
    for_forget: bool,
    for_retain: bool,
    for_scalars: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Also stands in for the native kernel where the gradients are to be differentiated in turn: autograd follows it.

    The result is the sum of the operands, each times a factor made of the scalars. So the gradient of an operand is
    its factor times the gradient of the result, and those of the scalars are the derivatives of the factors, weighed
    by the operands' inner products with the gradient of the result. A factor is affine in each scalar by itself: its
    derivative is the difference between its values at 1 and at 0, and is not written here a second time.
    """
    op = "update_backward"
    names = tuple(check_scalars(op, scalars))
    _check_update(op, weights, slow, forget_grads, retain_grads, bits)
    check_list(op, "output_grads", output_grads, "weights", weights, WEIGHTS, may_be_absent=False)
    operands = {"weights": weights, "slow": slow, "forget": forget_grads, "retain": retain_grads}
    needed = {"weights": for_weights, "slow": for_slow, "forget": for_forget, "retain": for_retain}
    masked = {"forget"} | ({"retain"} if mask_retain else set())
    s = dict(zip(names, scalars.unbind(), strict=True))
    zero, one = scalars.new_zeros(()), scalars.new_ones(())

    def factors_of(s: Scalars) -> dict[str, Tensor]:
        rate = s["slow_rate"] if slow else one
        factors = {"weights": rate, "slow": one - rate}
        if forget_grads or retain_grads:
            factors["weights"] = rate * (one - s["lr"] * s["weight_decay"])
        for part in ("forget", "retain"):
            factors[part] = -rate * s["lr"] * s["inverse_scale"] * s[f"{part}_weight"] * s[f"{part}_clip"]
        return factors

    factors = factors_of(s)
    gradients: dict[str, list[Tensor]] = {name: [] for name in operands}
    products = dict.fromkeys(operands, zero)
    for i, weight in enumerate(weights):
        opmath = torch.float64 if weight.dtype == torch.float64 else torch.float32
        keep = unpack_bits([bits[i]], [weight])[0] if bits else None
        for name, tensors in operands.items():
            if not tensors:
                continue
            d, operand = output_grads[i].to(opmath), tensors[i].to(opmath)
            if keep is not None and name in masked:
                d, operand = torch.where(keep, d, 0.0), torch.where(keep, operand, 0.0)
            if needed[name]:
                gradients[name].append(torch.empty_like(weight, dtype=tensors[i].dtype).copy_(factors[name] * d))
            if for_scalars:
                products[name] = products[name] + _sum_in_fixed_order((d.double() * operand.double()).flatten())

    def weighed(s: Scalars) -> Tensor:
        return sum((factor * products[name] for name, factor in factors_of(s).items()), zero)

    of_scalars = scalars.new_empty(0)
    if for_scalars:
        of_scalars = torch.stack([weighed({**s, name: one}) - weighed({**s, name: zero}) for name in names])
    return gradients["weights"], gradients["slow"], gradients["forget"], gradients["retain"], of_scalars
