"""The released loop (K1nght/Unified-Unlearning-w-Remain-Geometry), and that loop as PyTorch does it best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.dit.ways import SIDES, Bench, Way

__all__ = ["Plain", "Tuned", "faster_adamw"]

_TRIED = 20_000_000  # weights on which torch's implementations of AdamW are compared


class _Loop(Way):
    """What both have in common: torch.optim's AdamW, its clipping, a bool for each weight."""

    masks: list[Tensor]
    adamw: dict[str, bool]  # which implementation

    def start_steps(self) -> None:
        method = self.bench.method
        self.optimizer = torch.optim.AdamW(
            self.bench.parameters,
            lr=method.lr,
            betas=method.betas,
            eps=method.eps,
            weight_decay=method.weight_decay,
            **self.adamw,
        )

    def start_fisher(self) -> None:
        self.diagonals: dict[str, list[Tensor]] = {}
        self.counts = dict.fromkeys(SIDES, 0)

    def _home(self) -> torch.device:
        """Where sums and mask are."""
        return self.bench.device

    def sums(self, side: str) -> dict[str, Tensor]:
        return dict(zip(self.bench.named, self.diagonals[side], strict=True))

    def kept(self) -> dict[str, Tensor]:
        return dict(zip(self.bench.named, self.masks, strict=True))

    def adopt(self, masks: dict[str, Tensor]) -> None:
        self.masks = [mask.to(self._home()) for mask in masks.values()]

    def fisher(self, side: str, batches: Sequence[Any]) -> None:
        if side not in self.diagonals:
            home = self._home()
            zeros = (torch.zeros(p.shape, dtype=torch.float32, device=home) for p in self.bench.parameters)
            self.diagonals[side] = list(zeros)
        for batch in batches:
            self.bench.fisher_loss(batch).backward()
            self._add(self.diagonals[side], self.bench.gradients())
            self.bench.clear()
        self.counts[side] += len(batches)

    def _add(self, sums: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def forget_step(self) -> None:
        bench = self.bench
        (-bench.method.forget_alpha * bench.losses(bench.forget).mean()).backward()
        self._mask_gradients()
        torch.nn.utils.clip_grad_norm_(bench.parameters, bench.method.max_norm)
        self.optimizer.step()
        bench.clear()

    def _mask_gradients(self) -> None:
        raise NotImplementedError

    def retain_step(self) -> None:
        bench = self.bench
        bench.losses(bench.retain).mean().backward()
        self.optimizer.step()
        bench.clear()


class Plain(_Loop):
    """Tensor by tensor: sums on the host, where every gradient is copied; a mask that goes to the device for every
    forget step; AdamW as torch.optim makes it by default."""

    def __init__(self, bench: Bench):
        super().__init__(bench)
        self.adamw = {}

    def _home(self) -> torch.device:
        return torch.device("cpu")

    def _add(self, sums: list[Tensor], gradients: list[Tensor]) -> None:
        for total, g in zip(sums, gradients, strict=True):
            total += g.cpu() ** 2

    def mask(self) -> None:
        method = self.bench.method
        of_forget, of_retain = (self.counts[side] for side in SIDES)
        self.masks = [
            (f / of_forget + method.fisher_eps) / (r / of_retain + method.fisher_eps) >= method.gamma
            for f, r in zip(*(self.diagonals[side] for side in SIDES), strict=True)
        ]

    def _mask_gradients(self) -> None:
        for p, mask in zip(self.bench.parameters, self.masks, strict=True):
            p.grad *= mask.to(p.device)


class Tuned(_Loop):
    """Lists of tensors at once, everything on the device, and the faster of torch's implementations of AdamW."""

    def __init__(self, bench: Bench, adamw: dict[str, bool] | None = None):
        super().__init__(bench)
        self.adamw = faster_adamw(bench.parameters) if adamw is None else adamw

    def _add(self, sums: list[Tensor], gradients: list[Tensor]) -> None:
        if gradients[0].dtype != torch.float32:
            gradients = [g.float() for g in gradients]
        torch._foreach_addcmul_(sums, gradients, gradients)

    def mask(self) -> None:
        """(F_f / n_f + eps) / (F_r / n_r + eps) ≥ gamma, solved for F_f - gamma · n_f / n_r · F_r: no quotient."""
        method = self.bench.method
        of_forget, of_retain = (self.counts[side] for side in SIDES)
        share = method.gamma * of_forget / of_retain
        least = method.fisher_eps * (method.gamma * of_forget - of_forget)
        forget, retain = (self.diagonals[side] for side in SIDES)
        if self.bench.device.type == "cpu":  # one difference at a time stays in the cache
            self.masks = [f.sub(r, alpha=share) >= least for f, r in zip(forget, retain, strict=True)]
        else:
            self.masks = [d >= least for d in torch._foreach_sub(forget, retain, alpha=share)]

    def _mask_gradients(self) -> None:
        torch._foreach_mul_(self.bench.gradients(), self.masks)


@torch.no_grad()
def faster_adamw(parameters: Sequence[Tensor]) -> dict[str, bool]:
    """``fused`` or ``foreach``, by trial on some of the weights."""
    tried: list[Tensor] = []
    for p in parameters:
        tried.append(p.detach().clone().requires_grad_())
        tried[-1].grad = torch.full_like(p, 1e-3)
        if sum(map(Tensor.numel, tried)) >= _TRIED:
            break
    wait = torch.cuda.synchronize if tried[0].is_cuda else lambda: None
    seconds: dict[str, float] = {}
    for name in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(tried, **{name: True})
        optimizer.step()
        took = []
        for _ in range(3):
            wait()
            started = time.perf_counter()
            optimizer.step()
            wait()
            took.append(time.perf_counter() - started)
        seconds[name] = min(took)
    return {min(seconds, key=seconds.get): True}
