"""SSD: selective synaptic dampening, without training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..data.streams import check_iterable, length
from ..distributed.modes import keeping_modes
from ..distributed.shards import is_sharded
from ..distributed.weights import check_weights
from ..distributed.wrappers import trainable
from ..errors import InputError
from ..saliency import FisherDiagonal, SaliencyMask
from ..tasks import Task, check_task
from ..tasks.data_check import DataCheck
from ..utils.arguments import check_count, check_finite, check_model
from ..utils.process import in_run_modes

__all__ = ["SSD", "Dampening", "dampening_factor"]


def dampening_factor(
    forget_sum: Tensor, retain_sum: Tensor, forget_count: int, retain_count: int, *, alpha: float, lambd: float
) -> Tensor:
    r"""Every weight's factor: :math:`\min(\lambda F_{all} / F_f, 1)` where :math:`F_f > \alpha F_{all}`, 1 elsewhere.

    :math:`F_f = S_f / c_f` and :math:`F_{all} = (S_f + S_r) / (c_f + c_r)`, from sums of squared gradients S over c
    batches or samples. In the dtype of the sums; plain PyTorch, since it is one pass in a run that takes many over the
    data.
    """
    forget = forget_sum / forget_count
    both = (forget_sum + retain_sum) / (forget_count + retain_count)
    return torch.where(forget > alpha * both, (lambd * both / forget).clamp_(max=1.0), 1.0)


@dataclass
class Dampening:
    """What was dampened.

    Attributes:
        mask: which weights.
        timings: seconds of ``fisher`` and ``dampening``.
        counts: ``trainable`` and ``dampened`` weights; ``forget`` and ``retain``: how many batches (or samples) their
            Fisher diagonals were measured on.
        mean_factor: of the dampened weights.
        backend: ``native`` or ``python``, of the Fisher sums.
        settings: of the method.
    """

    mask: SaliencyMask
    timings: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mean_factor: float = 1.0
    backend: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class SSD:
    r"""Selective synaptic dampening (arXiv 2308.07707).

    Scales down the weights that matter far more to the forget set than to all training data:

    .. math:: \theta \leftarrow \min(\lambda F_{all} / F_f, 1)\, \theta \quad\text{where}\quad F_f > \alpha F_{all}

    F are diagonals of the empirical Fisher information, over the forget set and over all training data. It makes no
    gradient step, so it has no learning rate and no iterations.

    :math:`F_{all}` takes no pass of its own: all training data are the forget and the retain set, so its sum of
    squares is that of both, and its count too. (With ``per_sample=True`` that is exactly what a third pass would give.
    With batch gradients such a pass would mix both sets in its batches; ours are of one set each.) It follows that
    F_f / F_all is at most :math:`(c_f + c_r) / c_f`. An alpha or a λ from there on dampens nothing and is refused: for
    one of ten classes of equal size that is 10, which is the default alpha and suits a class of many.

    Args:
        alpha: how many times F_all a weight's F_f must exceed.
        lambd: λ. 0 sets the chosen weights to 0. Above alpha it decides which they are: no factor exceeds 1, so weights
            whose F_f is at most λ F_all stay as they are.
        per_sample: F from gradients of single samples; otherwise from those of batch means, as in
            :class:`~unlearn_ext.FisherDiagonal`.
        chunk: samples differentiated at once with ``per_sample``.
    """

    name: ClassVar[str] = "ssd"

    alpha: float = 10.0
    lambd: float = 1.0
    per_sample: bool = False
    chunk: int = 8

    def __post_init__(self) -> None:
        self.alpha, self.lambd = check_finite("alpha", self.alpha), check_finite("lambd", self.lambd)
        self.chunk = check_count("chunk", self.chunk)

    @in_run_modes
    def run(
        self,
        model: nn.Module,
        task: Task,
        forget: Iterable[Any],
        retain: Iterable[Any],
        *,
        allow_duplicates: bool = False,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> Dampening:
        """Forgets ``forget`` and keeps ``retain``, in place, after one pass over each in eval mode.

        Parameters with ``requires_grad=False`` and buffers stay as they are. Nothing is written before all is computed.

        Args:
            forget, retain: iterables of batches.
            allow_duplicates: do not refuse samples that stand in both sets.
            progress: called with a stage's name, what is done and what there is in all (None if unknown).

        Raises:
            InputError: data or weights that do not fit or have no values, or an alpha or λ that dampens no weight.
            NonFiniteError: a loss or a squared gradient is not finite.
        """
        check_model(model)
        check_weights(model)
        check_task(task)
        named = trainable(model)
        if any(map(is_sharded, named.values())):
            raise InputError("SSD needs whole weights, and these are sharded: run it before fully_shard")
        started = time.perf_counter()
        sets = {"forget": forget, "retain": retain}
        for name, data in sets.items():
            check_iterable(name, data)
        fisher = self._measure(model, task, sets, DataCheck(model, task, allow_duplicates), progress)
        measured = time.perf_counter()
        factors = self._factors(fisher["forget"], fisher["retain"])
        chosen = {name: factor < 1.0 for name, factor in factors.items()}
        dampened = sum(int(mask.sum()) for mask in chosen.values())
        if not dampened:
            raise InputError(
                f"{self._at_fault} dampens no weight, so nothing would be forgotten: no F_f exceeds that many times "
                "F_all; lower it"
            )
        total = sum(float(factors[name][mask].double().sum()) for name, mask in chosen.items())
        with torch.no_grad(), keeping_modes(model):
            model.train()  # a class may merge adapters into weights in eval mode
            for name, p in named.items():  # where, since a weight that is not chosen keeps its exact bits
                p.copy_(torch.where(chosen[name], p * factors[name], p))
        return Dampening(
            mask=SaliencyMask.from_dict(chosen, {"alpha": repr(float(self.alpha))}),
            timings={"fisher": measured - started, "dampening": time.perf_counter() - measured},
            counts={
                "trainable": sum(p.numel() for p in named.values()),
                "dampened": dampened,
                **{name: found.count for name, found in fisher.items()},
            },
            mean_factor=total / dampened,
            backend=ops.backend(next(iter(named.values())).device),
            settings={"method": self.name, **vars(self)},
        )

    def _measure(
        self, model: nn.Module, task: Task, sets: dict[str, Iterable[Any]], check: DataCheck, progress: Callable | None
    ) -> dict[str, FisherDiagonal]:
        found = {}
        for name, data in sets.items():
            done, total = 0, length(data)

            def watch(batch: Any, name: str = name, total: int | None = total) -> None:
                nonlocal done
                done += 1
                check.add(name, batch)
                if progress is not None:
                    progress(f"Fisher, {name} set", done, total)

            fisher = FisherDiagonal(model, task, per_sample=self.per_sample, chunk=self.chunk)
            found[name] = fisher.measure(data, name=name, watch=watch)
            check.finish(name)
        return found

    @property
    def _at_fault(self) -> str:
        """What is in the way where nothing is dampened: F_f has to exceed both alpha F_all and λ F_all."""
        return f"alpha={self.alpha:g}" if self.alpha >= self.lambd else f"lambd={self.lambd:g}"

    def _factors(self, forget: FisherDiagonal, retain: FisherDiagonal) -> dict[str, Tensor]:
        """By name; the forget set's sums are dropped as they are used."""
        largest = (forget.count + retain.count) / forget.count
        if max(self.alpha, self.lambd) >= largest:
            raise InputError(
                f"{self._at_fault} can dampen no weight: F_f is at most {largest:.4g} times F_all where the forget set "
                f"is {forget.count} of {forget.count + retain.count}; choose a number below that"
            )
        return {
            name: dampening_factor(
                forget.sums.pop(name), total, forget.count, retain.count, alpha=self.alpha, lambd=self.lambd
            )
            for name, total in retain.sums.items()
        }
