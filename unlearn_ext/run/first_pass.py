"""The first pass over a run's data: samples that stand in two sets, and the saliency mask."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..data.streams import empty_set, in_step, is_spent, length
from ..distributed.hashing import weights_hash
from ..distributed.ranks import ALONE
from ..errors import InputError
from ..saliency import FisherDiagonal, SaliencyMask
from ..saliency.gradient import GradientSum
from ..tasks.data_check import DataCheck
from ..utils.warn import warn
from .context import RunContext
from .result import Progress, Result
from .signs import start_batches, unseen_classes
from .small_batches import SmallBatches

__all__ = ["KEPT", "first_pass"]

KEPT = 2  # retain batches that are held until the first step, at most


def first_pass(
    context: RunContext,
    sets: dict[str, Iterable[Any]],
    result: Result,
    allow_duplicates: bool,
    progress: Progress,
    keep: Callable[[Any], Any],
) -> tuple[SaliencyMask | None, list[Any]]:
    """Looks at all samples of ``sets``, and gives the mask: a ready one, or measured as the method
    does; and a few retain batches, for a look at the weights before the first step. ``keep`` takes Fisher sums that are
    not needed for a while."""
    for name, data in sets.items():
        if length(data) == 0:  # before anything is measured
            raise empty_set(name, data)
    method, split = context.method, context.split_batches
    small = SmallBatches(context.model, context.task, method, sets, context.ranks, split)
    check = DataCheck(
        context.model,
        context.task,
        allow_duplicates,
        method.replaces,
        ALONE if split else context.ranks,
        small.find,
        min(KEPT, start_batches(context.task)) if method.retains else 0,  # taken in turn: a batch may be large
    )
    mask = _pass(context, sets, result, check, progress, keep)
    with context.ranks.together():
        for name, data in sets.items():
            if is_spent(data):
                raise empty_set(name, data, again=True)
    return mask, check.retained


def _pass(
    context: RunContext,
    sets: dict[str, Iterable[Any]],
    result: Result,
    check: DataCheck,
    progress: Progress,
    keep: Callable[[Any], Any],
) -> SaliencyMask | None:
    method = context.method
    if "unseen" in sets:  # before those that must not hold any of it
        check.scan("unseen", sets["unseen"])
    if method.measures is None:
        if method.mask is not None and not method.mask.kept:
            raise InputError("the mask keeps no weight, so nothing would be forgotten: pass one that keeps some")
        check.scan_rest(sets)
        _note_unseen(result, check)
        method.take_sizes(check.sizes())
        own, mask = check.forget_hash, method.mask
        if mask is not None and mask.metadata.get("forget_hash", own) != own:
            warn(
                "the mask was made for another forget set, or for other views of its samples: measure a new one "
                "unless that is meant"
            )
        return mask
    measure = {"fisher": _by_fisher, "gradient": _by_gradient}[method.measures]
    mask, whole = measure(context, sets, result, check, progress, keep)
    check.scan_rest(sets)
    _note_unseen(result, check, whole)
    if whole:
        method.take_sizes(check.sizes())
    if not mask.kept:
        gamma = getattr(method, "gamma", None)
        change = "raise mask_fraction" if gamma is None else f"lower gamma, which is {gamma:g}"
        raise InputError(f"the mask keeps no weight, so nothing would be forgotten: {change}")
    mask.metadata.update(
        weights_hash=weights_hash(context.named),
        seed=str(torch.initial_seed()),
        **({"forget_hash": check.forget_hash} if whole else {}),
    )
    return mask


def _note_unseen(result: Result, check: DataCheck, whole: bool = True) -> None:
    sentence = unseen_classes(check.labels, whole)
    if sentence is not None:
        result.warnings["unseen"] = sentence


def _by_fisher(
    context: RunContext,
    sets: dict[str, Iterable[Any]],
    result: Result,
    check: DataCheck,
    progress: Progress,
    keep: Callable[[Any], Any],
) -> tuple[SaliencyMask, bool]:
    """SFR-on's mask, and whether all batches were seen for it."""
    method = context.method
    whole = not check.allow_duplicates or method.fisher_batches is None  # all batches are to be seen
    diagonals: dict[str, FisherDiagonal] = {}
    started = time.perf_counter()
    for name, limit in zip(("forget", "retain"), method.fisher_limits, strict=True):
        data, total = sets[name], length(sets[name])
        if not whole:
            alike = context.ranks if context.split_batches else ALONE
            data = itertools.islice(in_step(data, alike), limit)
            total = limit if total is None else min(total, limit)
        with context.fisher_autocast():
            fisher = FisherDiagonal(
                context.model,
                context.task,
                batches=limit,
                max_norm=method.fisher_max_norm,
                split_batches=context.split_batches,
                in_backward=context.optimizer_in_backward,
            )
            watch = _watch(check, progress, name, "Fisher", total)
            diagonals[name] = fisher.measure(data, name=name, watch=watch)
            check.finish(name)
        if name == "forget":
            fisher.sums = keep(fisher.sums)
    result.timings["fisher"] = time.perf_counter() - started
    started = time.perf_counter()
    mask = SaliencyMask.from_fisher(
        diagonals["forget"],
        diagonals["retain"],
        gamma=method.gamma,
        mask_fraction=method.mask_fraction,
        eps=method.fisher_eps,
    )
    result.timings["mask"] = time.perf_counter() - started
    return mask, whole


def _by_gradient(
    context: RunContext,
    sets: dict[str, Iterable[Any]],
    result: Result,
    check: DataCheck,
    progress: Progress,
    keep: Callable[[Any], Any],
) -> tuple[SaliencyMask, bool]:
    """SalUn's mask: the weights of the largest sums of forget gradients."""
    started = time.perf_counter()
    with context.fisher_autocast():
        sums = GradientSum(
            context.model,
            context.task,
            split_batches=context.split_batches,
            in_backward=context.optimizer_in_backward,
        )
        watch = _watch(check, progress, "forget", "gradients", length(sets["forget"]))
        sums.measure(sets["forget"], name="forget", watch=watch)
        check.finish("forget")
    result.timings["gradients"] = time.perf_counter() - started
    started = time.perf_counter()
    mask = SaliencyMask.top_fraction(sums.sums, context.method.mask_fraction, score="magnitude")
    result.timings["mask"] = time.perf_counter() - started
    return mask, True


def _watch(check: DataCheck, progress: Progress, name: str, stage: str, total: int | None) -> Callable[[Any], None]:
    done = 0

    def watch(batch: Any) -> None:
        nonlocal done
        done += 1
        check.add(name, batch)
        progress(f"{stage}, {name} set", done, total)

    return watch
