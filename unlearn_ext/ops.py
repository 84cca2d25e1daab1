"""The operators: typed functions over lists of tensors.

Every operator takes lists, pairs them element by element and does its work in one pass over memory. The schemas
are defined here, once, for both backends; the kernels are compiled on first use (:mod:`unlearn_ext._native`), or
replaced by PyTorch operations where there is no compiler (:mod:`unlearn_ext._python_ops`).

Contracts that hold for all of them:

- Operands of one index must have equal shapes. Differing strides are handled; a channels_last weight with a
  contiguous gradient pairs the right elements.
- Bits are int32 words in the tensor's own memory order: weight i is bit ``i % 32`` of word ``i // 32``.
- The opmath type is float64 for float64 weights and float32 for all others; moments and slow weights have it.
- Errors name operator, argument, index, expected and got, and are raised before anything is written.
- Results are the same bits on every run and for every number of threads.
- In-place operators bump the version counters, and refuse tensors that autograd is following.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, _python_checks, _python_ops
from ._arguments import check_count, check_number, describe
from .errors import InputError

__all__ = [
    "RULES",
    "SCALARS",
    "SCORES",
    "accumulate_fisher_",
    "backend",
    "count_bits",
    "gradient_products",
    "pack_bits",
    "ratio_bits",
    "scalars",
    "step_",
    "top_bits",
    "unpack_bits",
    "update",
]

RULES = ("sgd", "momentum", "adam", "adamw")
MASK_SCOPES = ("forget", "all")
SCORES = ("value", "magnitude", "product", "ratio")

# Layout of the scalar tensor; enum ScalarIndex in csrc/math/update.h lists the same names.
SCALARS = (
    "lr",
    "forget_weight",
    "retain_weight",
    "forget_clip",
    "retain_clip",
    "momentum",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "step",
    "bias_correction1",
    "bias_correction2",
    "slow_rate",
    "inverse_scale",
    "skip",
)

# --- Registration -------------------------------------------------------------------------------------------

_SCHEMAS = (
    "step_(Tensor(a!)[] weights, Tensor(b!)[] slow, Tensor(c!)[] first_moments, Tensor(d!)[] second_moments, "
    "Tensor[] forget_grads, Tensor[] retain_grads, Tensor[] bits, Tensor scalars, int rule, bool mask_retain, "
    "bool protect, int rounding_seed) -> ()",
    "gradient_products(Tensor[] forget_grads, Tensor[] retain_grads, Tensor[] bits, bool mask_retain) -> Tensor",
    "accumulate_fisher_(Tensor(a!)[] fisher, Tensor[] grads, float weight) -> ()",
    "ratio_bits(Tensor[] forget_fisher, Tensor[] retain_fisher, float gamma, float eps, float forget_scale, "
    "float retain_scale) -> (Tensor[], Tensor)",
    "top_bits(Tensor[] scores, Tensor[] other, int k, int score, float eps, float forget_scale, float retain_scale) "
    "-> (Tensor[], Tensor)",
    "pack_bits(Tensor[] masks) -> Tensor[]",
    "unpack_bits(Tensor[] bits, Tensor[] like) -> Tensor[]",
    "count_bits(Tensor[] bits) -> Tensor",
    "update(Tensor[] weights, Tensor[] slow, Tensor[] forget_grads, Tensor[] retain_grads, Tensor[] bits, "
    "Tensor scalars, bool mask_retain) -> Tensor[]",
    "update_backward(Tensor[] output_grads, Tensor[] weights, Tensor[] slow, Tensor[] forget_grads, "
    "Tensor[] retain_grads, Tensor[] bits, Tensor scalars, bool mask_retain, bool for_weights, bool for_slow, "
    "bool for_forget, bool for_retain, bool for_scalars) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor)",
)
# Devices that have kernels, and what loads them; tensors elsewhere take the pure-PyTorch path.
_LOADERS: dict[str, Callable[[], str]] = {"cpu": _native.load, "cuda": _native.load_cuda}


def backend(device: torch.device | str = "cpu") -> str:
    """``native`` or ``python``: which implementation tensors on this device take. Builds the library if need be."""
    loader = _LOADERS.get(torch.device(device).type)
    return "python" if loader is None else loader()


_library = torch.library.Library("unlearn_ext", "DEF")


def _check_operands(name: str, args: Sequence[Any]) -> None:
    """What the native kernels never see, because it sends a call to another dispatch key: other layouts, mixed devices.

    It therefore costs the fast path nothing.
    """
    home = None
    for argument, tensors in zip(_ARGUMENTS[name], args, strict=True):
        single = isinstance(tensors, Tensor)  # the scalars, which may also stay on the CPU
        for i, tensor in enumerate([tensors] if single else tensors if isinstance(tensors, (list, tuple)) else ()):
            if tensor.layout != torch.strided:
                _python_checks.fail(name, f"{argument}[{i}]", "a dense tensor (layout strided)", f"{tensor.layout}")
            if tensor.is_quantized:
                _python_checks.fail(name, f"{argument}[{i}]", "a tensor of a floating dtype", f"{tensor.dtype}")
            home = tensor.device if home is None else home
            if tensor.device != home and not (single and tensor.device.type == "cpu"):
                _python_checks.fail(name, f"{argument}[{i}]", f"device {home} as the others have", f"{tensor.device}")


def _first_use_kernel(name: str) -> Callable:
    """The kernel behind an operator until the native one is loaded, and for devices that have no native one.

    It stands under a key that a device's own kernel outranks, so once the library is loaded it costs nothing,
    and every way into the operator (eager, compiled, direct) loads the library.
    """
    fallback = getattr(_python_ops, name)

    def kernel(*args):
        _check_operands(name, args)
        device = next(t.device for arg in args if isinstance(arg, list) for t in arg)
        if backend(device) == "native":
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_ext::{name}", device.type.upper()):
                raise _native.no_kernel(name, device.type)  # this one would call itself for ever
            return getattr(torch.ops.unlearn_ext, name).default(*args)
        return fallback(*args)

    return kernel


def _fake_words(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.new_empty((t.numel() + 31) // 32, dtype=torch.int32) for t in tensors]


def _fake_update_backward(
    output_grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    slow: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    retain_grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    scalars: Tensor,
    mask_retain: bool,
    *wanted: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    def fakes(tensors: Sequence[Tensor], wanted: bool) -> list[Tensor]:
        if not wanted:
            return []
        pairs = zip(weights, tensors, strict=False)  # a list that is absent has none
        return [torch.empty_like(weight, dtype=tensor.dtype) for weight, tensor in pairs]

    lists = [fakes(*pair) for pair in zip((weights, slow, forget_grads, retain_grads), wanted[:4], strict=True)]
    return *lists, scalars.new_empty(len(SCALARS) if wanted[4] else 0)


# Results without values, for tracing.
_FAKES: dict[str, Callable] = {
    "step_": lambda *args: None,
    "gradient_products": lambda f, r, bits, mask_retain: (f or r)[0].new_empty(4, dtype=torch.float64),
    "accumulate_fisher_": lambda *args: None,
    "ratio_bits": lambda f, *args: (_fake_words(f), f[0].new_empty(len(f), dtype=torch.int64)),
    "top_bits": lambda scores, *args: (_fake_words(scores), scores[0].new_empty(len(scores), dtype=torch.int64)),
    "pack_bits": _fake_words,
    "unpack_bits": lambda bits, like: [torch.empty_like(t, dtype=torch.bool) for t in like],
    "count_bits": lambda bits: bits[0].new_empty(len(bits), dtype=torch.int64),
    "update": lambda weights, *args: [torch.empty_like(weight) for weight in weights],
    "update_backward": _fake_update_backward,
}


def _fake_kernel(name: str) -> Callable:
    def fake(*args):
        _check_operands(name, args)
        return _FAKES[name](*args)

    return fake


_ARGUMENTS: dict[str, list[str]] = {}


def _register() -> None:
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _first_use_kernel(name), "CompositeExplicitAutograd")
        _ARGUMENTS[name] = [a.name for a in getattr(torch.ops.unlearn_ext, name).default._schema.arguments]
        torch.library.register_fake(f"unlearn_ext::{name}", _fake_kernel(name), lib=_library)


_register()


# --- Autograd of update -------------------------------------------------------------------------------------


def _save_for_update_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *lists, scalars, ctx.mask_retain = inputs
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors), scalars)


def _update_backward(ctx: Any, output_grads: list[Tensor]) -> tuple[Any, ...]:
    """One fused pass. Where the gradients get a graph of their own (create_graph=True), ordinary operations instead,
    which autograd can follow to any order."""
    *saved, scalars = ctx.saved_tensors
    remaining = iter(saved)
    lists = [[next(remaining) for _ in range(length)] for length in ctx.lengths]
    needed = [any(need) if isinstance(need, list) else need for need in ctx.needs_input_grad]
    *in_lists, _bits, for_scalars, _mask_retain = needed
    backward = _python_ops.update_backward if torch.is_grad_enabled() else torch.ops.unlearn_ext.update_backward
    *gradients, of_scalars = backward(output_grads, *lists, scalars, ctx.mask_retain, *in_lists, for_scalars)
    of_lists = [got or [None] * length for got, length in zip([*gradients, []], ctx.lengths, strict=True)]
    return *of_lists, of_scalars if for_scalars else None, None


torch.library.register_autograd(
    "unlearn_ext::update", _update_backward, setup_context=_save_for_update_backward, lib=_library
)


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


def _number(
    op: str,
    argument: str,
    value: Any,
    expected: str = "a finite number",
    fits: Callable[[float], bool] = math.isfinite,
) -> float:
    # Compiled graphs take any number. Else a plain one is looked at here: steps are many.
    if torch.compiler.is_compiling() or (isinstance(value, float) and fits(value)):
        return value
    return check_number(f"{op}: {argument}", value, expected, fits)


def _bump_versions(*lists: Sequence[Tensor]) -> None:
    # Compiled graphs account for mutation themselves.
    if not torch.compiler.is_compiling():  # in inference mode too, where only inference tensors have no version
        torch.autograd.graph.increment_version([t for tensors in lists for t in tensors])


def _mask_retain(op: str, mask_scope: str) -> bool:
    if mask_scope not in MASK_SCOPES:
        raise ValueError(f"{op}: mask_scope: expected one of {', '.join(MASK_SCOPES)}, got {mask_scope!r}")
    return mask_scope == "all"


# --- Operators ----------------------------------------------------------------------------------------------


def scalars(
    *,
    lr: float | Tensor,
    forget_weight: float | Tensor = 1.0,
    retain_weight: float | Tensor = 1.0,
    forget_clip: float | Tensor = 1.0,
    retain_clip: float | Tensor = 1.0,
    momentum: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    step: int = 1,
    slow_rate: float | Tensor = 1.0,
    inverse_scale: float | Tensor = 1.0,
    skip: bool | Tensor = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The scalars of one :func:`step_` as a float64 tensor, in the order of :data:`SCALARS`.

    They live in a tensor so that a native step need not wait for the device. Those that may be 0-d tensors, as
    computed from :func:`gradient_products` or learnt through :func:`update`, are copied without waiting either, and
    autograd follows them.

    Args:
        lr: learning rate.
        forget_weight, retain_weight: factors of the two gradients.
        forget_clip, retain_clip: further factors of the two gradients, from clipping by norm.
        momentum: factor of the momentum buffer, for rule ``momentum``.
        beta1, beta2, eps: of rules ``adam`` and ``adamw``.
        weight_decay: coupled (added to the gradient), or decoupled for ``adamw``.
        step: how many steps the moments have seen including this one, from 1; for the bias corrections.
        slow_rate: how far the slow weights move towards the fast ones.
        inverse_scale: 1 / loss scale, a factor of both gradients.
        skip: true when a gradient is not finite; the step then writes nothing.

    Raises:
        InputError: a number that is not finite, a tensor of several elements, or a ``step`` below 1.
    """
    if not isinstance(step, int) or step < 1:
        step = check_count("scalars: step", step)
    values = {
        "lr": lr,
        "forget_weight": forget_weight,
        "retain_weight": retain_weight,
        "forget_clip": forget_clip,
        "retain_clip": retain_clip,
        "momentum": momentum,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "step": step,
        "bias_correction1": 0.0,
        "bias_correction2": 0.0,
        "slow_rate": slow_rate,
        "inverse_scale": inverse_scale,
        "skip": skip,
    }
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise InputError(f"scalars: {name}: expected a number or a 0-d tensor, got shape {list(value.shape)}")
        elif not isinstance(value, bool):
            values[name] = _number("scalars", name, value, "a finite number or a 0-d tensor")
    values["bias_correction1"], values["bias_correction2"] = 1.0 - beta1**step, 1.0 - beta2**step
    ordered = [values[name] for name in SCALARS]
    numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in ordered]
    result = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device is not None and torch.device(device).type == "cuda":
        result = result.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    elif device is not None:
        result = result.to(device)
    for i, value in enumerate(ordered):
        if isinstance(value, Tensor):
            result[i] = value
    return result


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
        weights: float64, float32, bfloat16 or float16 tensors, n of them.
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

    Source: SFR-on, arXiv 2409.19732; csrc/math/update.h.
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
    return torch.ops.unlearn_ext.gradient_products(forget_grads, retain_grads, bits, mask_retain)


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
    torch.ops.unlearn_ext.accumulate_fisher_(fisher, grads, _number("accumulate_fisher_", "weight", weight))
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
        _number("ratio_bits", "gamma", gamma, "a number, or inf for no bits", lambda x: not math.isnan(x)),
        *(_number("ratio_bits", name, value) for name, value in numbers.items()),
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
    rates = (_number("top_bits", name, value) for name, value in numbers.items())
    return torch.ops.unlearn_ext.top_bits(scores, other, k, SCORES.index(score), *rates)


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
    return torch.ops.unlearn_ext.unpack_bits(bits, like)


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

    Source: csrc/math/update.h.
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
    return torch.ops.unlearn_ext.update(weights, slow, forget_grads, retain_grads, bits, packed, mask_retain)
