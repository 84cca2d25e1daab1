"""The operators as typed functions that check their arguments; :mod:`unlearn_ext.ops` says what holds for all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import describe
from . import registration  # noqa: F401 - the operators exist from here on
from .layout import MASK_SCOPES, RULES, SCORES, number, scalars

__all__ = [
    "accumulate_fisher_",
    "count_bits",
    "gradient_products",
    "pack_bits",
    "ratio_bits",
    "step_",
    "top_bits",
    "unpack_bits",
    "update",
]

# --- Guards -------------------------------------------------------------------------------------------------


def _refuse_followed(op: str, **lists: Sequence[Tensor]) -> None:
    """In-place kernels are invisible to autograd: writing to a tensor it follows would give wrong gradients."""
    if not torch.is_grad_enabled():
        return
    for argument, tensors in lists.items():
        for i, t in enumerate(tensors):
            if getattr(t, "requires_grad", False):  # the dispatcher refuses what is no tensor
                raise RuntimeError(
                    f"{op}: {argument}[{i}]: expected a tensor that autograd does not follow, got one that "
                    "requires grad while gradients are recorded; call it under torch.no_grad()"
                )


def _listed(op: str, **arguments: Any) -> list[list[Tensor]]:
    """Lists of what may be any iterable. A tensor alone would pass for its rows, and a dict for its keys."""
    for argument, tensors in arguments.items():
        if isinstance(tensors, (Tensor, Mapping, str)) or not isinstance(tensors, Iterable):
            raise InputError(f"{op}: {argument}: expected a list of tensors, got {describe(tensors)}")
    return [list(tensors) for tensors in arguments.values()]


def _bump_versions(*lists: Sequence[Tensor]) -> None:
    # Compiled graphs account for mutation themselves.
    if not torch.compiler.is_compiling():  # in inference mode too, where only inference tensors have no version
        torch.autograd.graph.increment_version([t for tensors in lists for t in tensors])


def _mask_retain(op: str, mask_scope: str) -> bool:
    if mask_scope not in MASK_SCOPES:
        raise ValueError(f"{op}: mask_scope: expected one of {', '.join(MASK_SCOPES)}, got {mask_scope!r}")
    return mask_scope == "all"


# --- Operators ----------------------------------------------------------------------------------------------


def step_(
    weights: Sequence[Tensor],
    *,
    rule: str,
    scalars: Tensor,
    forget_grads: Sequence[Tensor] = (),
    retain_grads: Sequence[Tensor] = (),
    slow: Sequence[Tensor] = (),
    first_moments: Sequence[Tensor] = (),
    second_moments: Sequence[Tensor] = (),
    bits: Sequence[Tensor] = (),
    mask_scope: str = "forget",
    protect: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """Moves a list of weights by one step, in place and in one pass over memory.

    Per weight, in the opmath type::

        g      = (keep ? inverse_scale * forget_weight * forget_clip * g_f : 0)
               + inverse_scale * retain_weight * retain_clip * g_r
        theta' = rule(theta, g)
        slow'  = slow + slow_rate * (theta' - slow);  theta' = slow'      (only when `slow` is given)

    Gradients are descent directions: g_f is the gradient of what forgetting minimises. Masked-out gradients are
    deselected, not multiplied by zero, so an inf or a NaN among them cannot leak. With neither gradient list only
    the interpolation happens.

    Args:
        weights: float64, float32, bfloat16 or float16 tensors, n of them. Tensors that are written must lie apart:
            slices of one buffer that interleave are refused.
        rule: ``sgd``, ``momentum`` (torch.optim.SGD's convention), ``adam`` (coupled decay) or ``adamw``
            (decoupled decay), each as in torch.optim.
        scalars: from :func:`scalars`.
        forget_grads, retain_grads: n tensors each, or none; any floating dtype. They must not share memory with
            what is written.
        slow: n slow weights when the round closes with this step, else none.
        first_moments: n momentum buffers or first moments, where the rule has them; zero at the start.
        second_moments: n second moments, for ``adam`` and ``adamw``.
        bits: n masks as packed bits, or none.
        mask_scope: ``forget`` masks the forget gradient only, ``all`` both.
        protect: a weight whose bit is 0 keeps its exact bits, and so do its moments and slow weight: no momentum,
            no decay, no interpolation.
        rounding_seed: round bfloat16 weights stochastically with this seed (0 or more) instead of to nearest, so
            that steps smaller than half a unit in the last place are not lost on average. Use a new seed each step.

    Raises:
        RuntimeError: operands that do not fit together, or weights that autograd is following.
        ValueError: an unknown rule or mask scope, or a negative seed.

    Source: SFR-on, arXiv 2409.19732; csrc/math/step.h.
    """
    if rule not in RULES:
        raise ValueError(f"step_: rule: expected one of {', '.join(RULES)}, got {rule!r}")
    mask_retain = _mask_retain("step_", mask_scope)
    if rounding_seed is not None and not (isinstance(rounding_seed, int) and 0 <= rounding_seed < 2**63):
        raise InputError(f"step_: rounding_seed: expected 0 to 2**63 - 1, got {describe(rounding_seed)}")
    weights, slow, first_moments, second_moments, forget_grads, retain_grads, bits = _listed(
        "step_", weights=weights, slow=slow, first_moments=first_moments, second_moments=second_moments,
        forget_grads=forget_grads, retain_grads=retain_grads, bits=bits,
    )  # fmt: skip
    if not isinstance(scalars, Tensor):
        raise InputError(f"step_: scalars: expected what ops.scalars() gives, got {describe(scalars)}")
    if not weights:
        return
    _refuse_followed("step_", weights=weights, slow=slow, first_moments=first_moments, second_moments=second_moments)
    torch.ops.unlearn_ext.step_(
        weights,
        slow,
        first_moments,
        second_moments,
        forget_grads,
        retain_grads,
        bits,
        scalars,
        RULES.index(rule),
        mask_retain,
        protect,
        -1 if rounding_seed is None else rounding_seed,
    )
    _bump_versions(weights, slow, first_moments, second_moments)


def gradient_products(
    forget_grads: Sequence[Tensor] = (),
    retain_grads: Sequence[Tensor] = (),
    bits: Sequence[Tensor] = (),
    mask_scope: str = "forget",
) -> Tensor:
    """Sums over all weights of two gradient lists, in one read.

    Returns:
        float64 tensor of 4: Σ g_f², Σ g_r², Σ g_f·g_r and the count of non-finite entries; a masked-out entry
        counts nowhere. Sums are in double, in a fixed order. With one list absent its sums are 0.
    """
    mask_retain = _mask_retain("gradient_products", mask_scope)
    forget_grads, retain_grads, bits = _listed(
        "gradient_products", forget_grads=forget_grads, retain_grads=retain_grads, bits=bits
    )
    if not forget_grads and not retain_grads:
        raise ValueError("gradient_products: forget_grads, retain_grads: expected at least one list, got none")
    products: Tensor = torch.ops.unlearn_ext.gradient_products(forget_grads, retain_grads, bits, mask_retain)
    return products


def accumulate_fisher_(fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0) -> None:
    """F += weight · g², the running diagonal of the empirical Fisher information, in place.

    Args:
        fisher: float32 or float64 tensors.
        grads: one gradient of equal shape for each, of any floating dtype.
        weight: factor of the squares.
    """
    fisher, grads = _listed("accumulate_fisher_", fisher=fisher, grads=grads)
    if not fisher and not grads:
        return
    if not fisher:
        raise ValueError(f"accumulate_fisher_: grads: expected no tensors (one for each of fisher), got {len(grads)}")
    _refuse_followed("accumulate_fisher_", fisher=fisher)
    torch.ops.unlearn_ext.accumulate_fisher_(fisher, grads, number("accumulate_fisher_", "weight", weight))
    _bump_versions(fisher)


def ratio_bits(
    forget_fisher: Sequence[Tensor],
    retain_fisher: Sequence[Tensor],
    *,
    gamma: float = 1.0,
    eps: float = 1e-15,
    forget_scale: float = 1.0,
    retain_scale: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """SFR-on's saliency mask: a bit is set where (F_f·forget_scale + eps) / (F_r·retain_scale + eps) ≥ gamma.

    Args:
        forget_fisher, retain_fisher: float32 or float64 tensors of equal shapes; sums or means.
        gamma: the ratio a weight must reach to be kept.
        eps: keeps the ratio finite; in the dtype of the Fisher tensors.
        forget_scale, retain_scale: turn sums into means.

    Returns:
        int32 words per tensor, in the memory order of ``forget_fisher``, and the int64 count of set bits of each.
        A NaN ratio gives 0.

    Source: arXiv 2409.19732.
    """
    forget_fisher, retain_fisher = _listed("ratio_bits", forget_fisher=forget_fisher, retain_fisher=retain_fisher)
    if not forget_fisher and not retain_fisher:
        return [], torch.zeros(0, dtype=torch.int64, device="cpu")
    numbers = {"eps": eps, "forget_scale": forget_scale, "retain_scale": retain_scale}
    if not forget_fisher:
        raise ValueError(f"ratio_bits: retain_fisher: expected no tensors, got {len(retain_fisher)}")
    bits, counts = torch.ops.unlearn_ext.ratio_bits(
        forget_fisher,
        retain_fisher,
        number("ratio_bits", "gamma", gamma, "a number, or inf for no bits", lambda x: not math.isnan(x)),
        *(number("ratio_bits", name, value) for name, value in numbers.items()),
    )
    return bits, counts


def top_bits(
    scores: Sequence[Tensor],
    k: int,
    *,
    other: Sequence[Tensor] = (),
    score: str = "value",
    eps: float = 1e-15,
    forget_scale: float = 1.0,
    retain_scale: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """The mask of exactly the k weights of the largest scores over a whole list.

    Radix select on the bits of the scores: no sort, no concatenation, and apart from the result at most 1 MiB of
    memory, however large the list. Scores are computed where they are read, in float64 if one of their tensors is
    float64 and in float32 otherwise. NaN ranks last, after -inf; -0 equals +0. Of equal scores the first in the list
    are kept, and within a tensor the first in the memory order of ``scores``: the choice of a stable sort.

    Args:
        scores: tensors of any floating dtype, mixed at will.
        k: how many weights are kept, from 0 to all.
        other: one tensor of equal shape for each, where the score takes two numbers; otherwise none.
        score: ``value``: s as given. ``magnitude``: abs(s), for gradients (SalUn). ``product``: abs(s · other), for
            gradients and weights. ``ratio``: (s·forget_scale + eps) / (other·retain_scale + eps), for the Fisher
            diagonals F_f and F_r, as in :func:`ratio_bits`.
        eps, forget_scale, retain_scale: of ``ratio``.

    Returns:
        int32 words per tensor, in the memory order of ``scores``, and the int64 count of set bits of each.

    Source: SalUn, arXiv 2310.12508, masks by the largest gradients; csrc/math/radix.h.
    """
    if score not in SCORES:
        raise ValueError(f"top_bits: score: expected one of {', '.join(SCORES)}, got {score!r}")
    scores, other = _listed("top_bits", scores=scores, other=other)
    numbers = {"eps": eps, "forget_scale": forget_scale, "retain_scale": retain_scale}
    if not scores:
        if other or k:
            got = f"{len(other)} tensors" if other else str(k)
            argument, expected = ("other", "no tensors (one for each of scores)") if other else ("k", "0 of no weights")
            raise ValueError(f"top_bits: {argument}: expected {expected}, got {got}")
        return [], torch.zeros(0, dtype=torch.int64, device="cpu")
    rates = (number("top_bits", name, value) for name, value in numbers.items())
    result: tuple[list[Tensor], Tensor] = torch.ops.unlearn_ext.top_bits(scores, other, k, SCORES.index(score), *rates)
    return result


def pack_bits(masks: Sequence[Tensor]) -> list[Tensor]:
    """Bool tensors to int32 words of ⌈n/32⌉ each, in each tensor's memory order; the tail bits are zero."""
    (masks,) = _listed("pack_bits", masks=masks)
    return torch.ops.unlearn_ext.pack_bits(masks) if masks else []


def unpack_bits(bits: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack_bits`: bool tensors with the shapes and the memory order of ``like``."""
    bits, like = _listed("unpack_bits", bits=bits, like=like)
    if not bits and not like:
        return []
    if not like:
        raise ValueError(f"unpack_bits: bits: expected no tensors (one for each of like), got {len(bits)}")
    masks: list[Tensor] = torch.ops.unlearn_ext.unpack_bits(bits, like)
    return masks


def count_bits(bits: Sequence[Tensor]) -> Tensor:
    """How many bits are set in each tensor of words: int64 tensor of len(bits)."""
    (bits,) = _listed("count_bits", bits=bits)
    return torch.ops.unlearn_ext.count_bits(bits) if bits else torch.zeros(0, dtype=torch.int64, device="cpu")


def update(
    weights: Sequence[Tensor],
    *,
    lr: float | Tensor,
    forget_grads: Sequence[Tensor] = (),
    retain_grads: Sequence[Tensor] = (),
    slow: Sequence[Tensor] = (),
    bits: Sequence[Tensor] = (),
    forget_weight: float | Tensor = 1.0,
    retain_weight: float | Tensor = 1.0,
    forget_clip: float | Tensor = 1.0,
    retain_clip: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.0,
    slow_rate: float | Tensor = 1.0,
    mask_scope: str = "forget",
) -> list[Tensor]:
    """The plain step (rule ``sgd`` of :func:`step_`) as a function that autograd can differentiate.

    Per weight, in the opmath type::

        g      = (keep ? forget_weight * forget_clip * g_f : 0) + retain_weight * retain_clip * g_r
        theta' = theta - lr * (g + weight_decay * theta)
        result = slow + slow_rate * (theta' - slow)      (only when `slow` is given, else theta')

    Differentiable in weights, slow weights, both gradients and every scalar that is a tensor, so that steps can be
    unrolled and a loss after them followed back to their learning rate or strength: take the gradients with
    ``torch.autograd.grad(..., create_graph=True)`` to include how they depend on earlier steps. The backward is one
    fused pass; the gradients of the scalars are summed in it in double and in a fixed order. Under
    ``create_graph=True`` it is made of ordinary operations instead, slower and differentiable to any order.

    Args:
        weights: float64, float32, bfloat16 or float16 tensors, n of them.
        lr, weight_decay: of torch.optim.SGD.
        forget_grads, retain_grads: n tensors each, or none; any floating dtype.
        slow: n slow weights (float64 for float64 weights, float32 for all others), or none.
        bits: n masks as packed bits, or none.
        forget_weight, forget_clip, retain_weight, retain_clip: factors of the two gradients.
        slow_rate: how far the slow weights move towards the fast ones.
        mask_scope: ``forget`` masks the forget gradient only, ``all`` both. A masked-out entry counts nowhere,
            whatever it holds, and has a gradient of 0.

    Scalars are floats or tensors of one element, of any floating dtype; they are computed with in float64.

    Returns:
        n new tensors with the dtype and the memory order of the weights. Half-width weights are rounded to nearest,
        and the rounding counts as the identity in the derivative.

    Raises:
        RuntimeError: operands that do not fit together.
        ValueError: an unknown mask scope, or a scalar with more than one element.

    Source: csrc/math/step.h.
    """
    mask_retain = _mask_retain("update", mask_scope)
    weights, slow, forget_grads, retain_grads, bits = _listed(
        "update", weights=weights, slow=slow, forget_grads=forget_grads, retain_grads=retain_grads, bits=bits
    )
    if not weights:
        return []
    try:
        packed = scalars(
            lr=lr,
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            forget_clip=forget_clip,
            retain_clip=retain_clip,
            weight_decay=weight_decay,
            slow_rate=slow_rate,
            device=getattr(weights[0], "device", None),
        )
    except InputError as error:
        raise InputError(str(error).replace("scalars:", "update:", 1)) from None
    operands = weights, slow, forget_grads, retain_grads, bits
    updated: list[Tensor] = torch.ops.unlearn_ext.update(*operands, packed, mask_retain)
    return updated
