"""Registers the operators with PyTorch: schemas, kernels that load the library on first use, fakes, autograd.

A schema stands here once, for all backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..native import loading
from . import checks, eager
from .layout import SCALARS

__all__ = ["backend"]

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
_LOADERS: dict[str, Callable[[], str]] = {"cpu": loading.load, "cuda": loading.load_cuda}


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
                checks.fail(name, f"{argument}[{i}]", "a dense tensor (layout strided)", f"{tensor.layout}")
            if tensor.is_quantized:
                checks.fail(name, f"{argument}[{i}]", "a tensor of a floating dtype", f"{tensor.dtype}")
            home = tensor.device if home is None else home
            if tensor.device != home and not (single and tensor.device.type == "cpu"):
                checks.fail(name, f"{argument}[{i}]", f"device {home} as the others have", f"{tensor.device}")


def _first_use_kernel(name: str) -> Callable[..., Any]:
    """The kernel behind an operator until the native one is loaded, and for devices that have no native one.

    It stands under a key that a device's own kernel outranks, so once the library is loaded it costs nothing,
    and every way into the operator (eager, compiled, direct) loads the library.
    """
    fallback = getattr(eager, name)

    def kernel(*args: Any) -> Any:
        _check_operands(name, args)
        device = next(t.device for arg in args if isinstance(arg, list) for t in arg)
        if backend(device) == "native":
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_ext::{name}", device.type.upper()):
                raise loading.no_kernel(name, device.type)  # this one would call itself for ever
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
    *needed: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    def fakes(tensors: Sequence[Tensor], is_needed: bool) -> list[Tensor]:
        if not is_needed:
            return []
        pairs = zip(weights, tensors, strict=False)  # a list that is absent has none
        return [torch.empty_like(weight, dtype=tensor.dtype) for weight, tensor in pairs]

    for_weights, for_slow, for_forget, for_retain, for_scalars = needed
    return (
        fakes(weights, for_weights),
        fakes(slow, for_slow),
        fakes(forget_grads, for_forget),
        fakes(retain_grads, for_retain),
        scalars.new_empty(len(SCALARS) if for_scalars else 0),
    )


# Results without values, for tracing.
_FAKES: dict[str, Callable[..., Any]] = {
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


def _fake_kernel(name: str) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
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
    backward: Callable[..., Any] = torch.ops.unlearn_ext.update_backward
    if torch.is_grad_enabled():
        backward = eager.update_backward
    *gradients, of_scalars = backward(output_grads, *lists, scalars, ctx.mask_retain, *in_lists, for_scalars)
    of_lists = [got or [None] * length for got, length in zip([*gradients, []], ctx.lengths, strict=True)]
    return *of_lists, of_scalars if for_scalars else None, None


torch.library.register_autograd(
    "unlearn_ext::update", _update_backward, setup_context=_save_for_update_backward, lib=_library
)
