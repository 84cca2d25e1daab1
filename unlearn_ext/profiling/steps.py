"""The work of a step: jointly in one pass, or the weight work of one sequential SFR-on iteration.

- ``joint``: mask, sum of both gradients, rule, slow weights: one call of :func:`unlearn_ext.ops.step_`.
- ``sequential``: what :class:`unlearn_ext.UnlearnOptimizer` does between two backward passes and after the second:
  the masked norm, the clipped forget step, the retain step, the slow weights. Ours also looks for gradients that are
  not finite, which no rival does.

PyTorch's ways keep the mask as bool tensors and mask and clip gradients in place, as the released code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..optim import UnlearnOptimizer
from ..saliency import SaliencyMask
from .loop import Pass, loop
from .shapes import Shape
from .tensors import BETAS, DECAY, EPS, MAX_NORM, MOMENTUM, RATES, SLOW_RATE, Tensors
from .work import Run, Work

__all__ = ["joint", "sequential", "sequential_passes"]

_CLIP_EPS = 1e-6  # torch's


def joint(shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> Work:
    t = Tensors(shapes, rule, dtype, device)

    def fused() -> Run:
        def run() -> None:
            t.count += 1
            ops.step_(
                t.weights,
                rule=rule,
                scalars=t.scalars(slow_rate=SLOW_RATE),
                forget_grads=t.forget,
                retain_grads=t.retain,
                slow=t.slow,
                first_moments=t.first,
                second_moments=t.second,
                bits=t.bits,
            )

        return run

    def eager() -> Run:
        optimizer = t.optimizer(foreach=False)

        def run() -> None:
            for w, f, r, mask in zip(t.weights, t.forget, t.retain, t.masks, strict=True):
                w.grad = f * mask + r
            optimizer.step()
            _interpolate(t)

        return run

    def listed(**options: bool) -> Run:
        optimizer = t.optimizer(**options)

        def run() -> None:
            gradients = torch._foreach_mul(t.forget, t.masks)
            torch._foreach_add_(gradients, t.retain)
            t.give(gradients)
            optimizer.step()
            _interpolate_listed(t)

        return run

    def compiled() -> Run:
        def update(weights, slow, first, second, forget, retain, masks, corrections):
            gradients = [f.float() * mask + r.float() for f, r, mask in zip(forget, retain, masks, strict=True)]
            _update(rule, weights, first, second, gradients, corrections, slow)

        step = torch.compile(update, fullgraph=True, dynamic=False)

        def run() -> None:
            t.count += 1
            step(t.weights, t.slow, t.first, t.second, t.forget, t.retain, t.masks, _corrections(t))

        return run

    passes = [Pass([t.weights, t.slow, *t.moments], [t.forget, t.retain], t.bits)]
    return _work("joint", t, passes, fused, eager, listed, compiled)


def sequential(shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> Work:
    t = Tensors(shapes, rule, dtype, device)

    resets: list[Callable[[], None]] = []

    def fused() -> Run:
        optimizer = _unlearn_optimizer(t)

        def run() -> None:
            t.give(t.forget)
            optimizer.forget_step()
            t.give(t.retain)
            optimizer.retain_step()

        def reset() -> None:
            for w in t.weights:
                optimizer.state[w]["step"] = 0

        resets.append(reset)
        return run

    def eager() -> Run:
        optimizer = t.optimizer(foreach=False)

        def run() -> None:
            t.give(t.forget)
            for w, mask in zip(t.weights, t.masks, strict=True):
                w.grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(t.weights, MAX_NORM, foreach=False)
            optimizer.step()
            t.give(t.retain)
            optimizer.step()
            _interpolate(t)

        return run

    def listed(**options: bool) -> Run:
        optimizer = t.optimizer(**options)

        def run() -> None:
            torch._foreach_mul_(t.forget, t.masks)
            t.give(t.forget)
            torch.nn.utils.clip_grad_norm_(t.weights, MAX_NORM, foreach=True)
            optimizer.step()
            t.give(t.retain)
            optimizer.step()
            _interpolate_listed(t)

        return run

    passes = [named[1] for named in _sequential_traffic(t)]
    return _work("sequential", t, passes, fused, eager, listed, lambda: _compiled(t, rule), resets)


def _compiled(t: Tensors, rule: str) -> Run:
    def forget_step(weights, first, second, forget, masks, corrections):
        gradients = [f.float() * mask for f, mask in zip(forget, masks, strict=True)]
        norm = sum(g.square().sum() for g in gradients).sqrt()
        clip = torch.clamp(MAX_NORM / (norm + _CLIP_EPS), max=1.0)
        _update(rule, weights, first, second, [g * clip for g in gradients], corrections, None)

    def retain_step(weights, slow, first, second, retain, corrections):
        _update(rule, weights, first, second, [r.float() for r in retain], corrections, slow)

    forget = torch.compile(forget_step, fullgraph=True, dynamic=False)
    retain = torch.compile(retain_step, fullgraph=True, dynamic=False)

    def run() -> None:
        t.count += 1
        forget(t.weights, t.first, t.second, t.forget, t.masks, _corrections(t))
        t.count += 1
        retain(t.weights, t.slow, t.first, t.second, t.retain, _corrections(t))

    return run


def _unlearn_optimizer(t: Tensors) -> UnlearnOptimizer:
    """Ours, with state that shares the tensors of all ways."""
    names = [f"weight {i}" for i in range(len(t.weights))]
    optimizer = UnlearnOptimizer(
        list(zip(names, t.weights, strict=True)),
        rule=t.rule,
        lr=RATES[t.rule],
        momentum=MOMENTUM if t.rule == "momentum" else 0.0,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        max_norm=MAX_NORM,
        slow_rate=SLOW_RATE,
        mask=SaliencyMask.from_dict(dict(zip(names, t.masks, strict=True))),
    )
    kinds = ("momentum_buffer",) if t.rule == "momentum" else ("exp_avg", "exp_avg_sq")
    for i, w in enumerate(t.weights):
        moments = {kind: moment[i] for kind, moment in zip(kinds, t.moments, strict=False)}
        optimizer.state[w] = {"slow": t.slow[i], "step": t.count, **moments}
    return optimizer


def sequential_passes(
    shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, int, Run]]:
    """The passes of a sequential iteration one by one: name, least bytes, and the operator call alone."""
    t = Tensors(shapes, rule, dtype, device)
    t.count = 1
    moments = {"first_moments": t.first, "second_moments": t.second}
    forget, retain = t.scalars(forget_clip=0.5), t.scalars(slow_rate=SLOW_RATE)

    def step(scalars: Tensor, **lists: Sequence[Tensor]) -> Run:
        return lambda: ops.step_(t.weights, rule=rule, scalars=scalars, **moments, **lists)

    runs = [
        lambda: ops.gradient_products(t.forget, (), t.bits),
        step(forget, forget_grads=t.forget, bits=t.bits),
        lambda: ops.gradient_products((), t.retain),
        step(retain, retain_grads=t.retain, slow=t.slow),
    ]
    return [(name, moved.bytes, run) for (name, moved), run in zip(_sequential_traffic(t), runs, strict=True)]


def _sequential_traffic(t: Tensors) -> list[tuple[str, Pass]]:
    return [
        ("products", Pass(read=[t.forget], words_read=t.bits)),
        ("forget_step", Pass([t.weights, *t.moments], [t.forget], t.bits)),
        ("products", Pass(read=[t.retain])),
        ("retain_step", Pass([t.weights, *t.moments, t.slow], [t.retain])),
    ]


# --- What both share ----------------------------------------------------------------------------------------


def _work(
    operator: str,
    t: Tensors,
    passes: list[Pass],
    fused: Callable[[], Run],
    eager: Callable[[], Run],
    listed: Callable[..., Run],
    compiled: Callable[[], Run],
    resets: Sequence[Callable[[], None]] = (),
) -> Work:
    make: dict[str, Callable[[], Run]] = {
        "fused": fused,
        "loop": lambda: loop(passes),
        "eager": eager,
        "foreach": lambda: listed(foreach=True),
        "torch_fused": lambda: listed(fused=True),
        "torch_compile": compiled,
    }
    if t.dtype != torch.float32:
        # torch.optim keeps moments and slow weights in the weights' dtype: less to move, and other mathematics.
        make = {name: make[name] for name in ("fused", "loop", "torch_compile")}

    def reset() -> None:
        t.count = 0
        for one in resets:
            one()

    return Work(operator, t.rule, t.dtype, t.device, passes, make, t.all, lambda _: t.moved, t.triad, reset)


def _interpolate(t: Tensors) -> None:
    for w, s in zip(t.weights, t.slow, strict=True):
        s.lerp_(w, SLOW_RATE)
        w.copy_(s)


def _interpolate_listed(t: Tensors) -> None:
    torch._foreach_lerp_(t.slow, t.weights, SLOW_RATE)
    torch._foreach_copy_(t.weights, t.slow)


def _corrections(t: Tensors) -> Tensor:
    """1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), in a tensor: as numbers they would compile anew each step."""
    return torch.tensor([1 / (1 - BETAS[0] ** t.count), 1 / math.sqrt(1 - BETAS[1] ** t.count)], device=t.device)


def _update(
    rule: str,
    weights: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    gradients: Sequence[Tensor],
    corrections: Tensor,
    slow: Sequence[Tensor] | None,
) -> None:
    """The mathematics of csrc/math/step.h for torch.compile, which fuses it for each tensor."""
    rate = RATES[rule]
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        w, g = weight.float(), gradient
        if rule == "adamw":
            w = w * (1 - rate * DECAY)
        else:
            g = g + DECAY * w
        if rule == "sgd":
            w = w - rate * g
        elif rule == "momentum":
            m = MOMENTUM * first[i] + g
            first[i].copy_(m)
            w = w - rate * m
        else:
            m = first[i] + (1 - BETAS[0]) * (g - first[i])
            v = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
            first[i].copy_(m)
            second[i].copy_(v)
            w = w - rate * corrections[0] * m / (v.sqrt() * corrections[1] + EPS)
        if slow is not None:
            w = slow[i] + SLOW_RATE * (w - slow[i])
            slow[i].copy_(w)
        weight.copy_(w)
