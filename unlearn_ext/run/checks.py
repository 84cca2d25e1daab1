"""What a run is refused for before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DistributedSampler

from ..data.streams import with_own_workers
from ..distributed.shards import is_sharded
from ..errors import InputError
from ..methods import Method
from ..tasks import Task
from ..utils.arguments import check_count
from .context import RunContext

__all__ = ["check_counts", "check_in_backward", "check_loaders", "check_offers", "check_ranks", "check_settings"]
__all__ += ["chosen_sets"]


def check_in_backward(method: Method, mixed_precision: str, gradient_accumulation_steps: int) -> None:
    """Whether a run's other settings go without whole gradients; InputError if not."""
    for needed, why in (
        (method.learns, "a method that learns adds up the gradients of two sets"),
        (method.update == "joint", "update='joint' needs the gradients of both sides at once"),
        (gradient_accumulation_steps > 1, "gradient_accumulation_steps above 1 adds up whole gradients before a step"),
        (mixed_precision == "fp16", "mixed_precision='fp16' looks at all gradients before a step; use bf16 or no"),
    ):
        if needed:
            raise InputError(f"optimizer_in_backward frees each gradient at once, and {why}: leave one of them out")


def check_offers(method: Method, task: Task, gradient_accumulation_steps: int) -> None:
    """Whether the task offers what the method needs; InputError if not."""
    for needed, offered, what in (
        (method.replaces, "replacement_losses", "has no replacement for what is forgotten"),
        (
            method.forget_teacher or method.retain_teacher,
            "losses_and_distances",
            "measures no distance to another network",
        ),
    ):
        if needed and getattr(type(task), offered) is getattr(Task, offered):
            raise InputError(
                f"{type(task).__name__} {what}: choose a method that needs none"
                + (", as with forget_term='ascent'," if method.replaces else "")
                + f" or give the task {offered}"
            )
    if getattr(method, "target_accuracy", None) is not None:
        task.check_accuracy()
    if gradient_accumulation_steps > 1 and not method.adds_up:
        raise InputError(
            f"{method.name} takes a function of a whole batch's losses, which does not add up over batches: "
            "leave gradient_accumulation_steps out, and use larger batches"
        )


def check_settings(settings: dict[str, Any]) -> None:
    """Whether a checkpoint can hold them."""
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise InputError(
                f"{name}: a checkpoint cannot hold {value!r}, of type {type(value).__name__}: give a number, a "
                "text, or lists and dicts of them, or leave checkpointing_steps out"
            ) from None


def chosen_sets(method: Method, **given: Iterable[Any] | None) -> dict[str, Iterable[Any]]:
    """Those that were given, which have to be those that the method takes."""
    needed = {"forget": method.forgets, "retain": method.retains, "learn": method.learns}
    needed["unseen"] = method.needs_unseen
    needed["forget"] |= method.measures is not None
    needed["retain"] |= method.measures == "fisher"
    for name, data in given.items():
        what = f"{'an' if name == 'unseen' else 'a'} {name} set"
        if data is None and needed[name]:
            raise InputError(f"{method.name} takes {what}: pass {name}=, a DataLoader or a list of batches")
        if data is not None and name in ("learn", "unseen") and not needed[name]:
            raise InputError(f"{method.name} has no use for {what}: leave {name} out")
    return {name: with_own_workers(data) for name, data in given.items() if data is not None}


def check_ranks(context: RunContext) -> None:
    """What several ranks cannot do."""
    if context.ranks.size == 1:
        return
    if not context.method.adds_up:
        raise InputError(
            f"{context.method.name} takes a function of a whole batch's losses, which does not add up over ranks: "
            "run it in one process"
        )
    if context.method.needs_unseen:
        raise InputError(f"{context.method.name} looks at unseen data in one process: run it in one")
    sharded = any(is_sharded(p) for _, p in context.named)
    if sharded and context.method.measures == "gradient":
        raise InputError(
            f"{context.method.name} ranks the gradients of whole weights, and these are sharded: measure in one "
            "process or with DistributedDataParallel, or pass a mask"
        )
    if context.mixed_precision == "fp16" and sharded:
        raise InputError("fp16 is not supported for sharded weights: use bf16 or no")
    if context.optimizer_in_backward:
        raise InputError(
            "optimizer_in_backward is for one process: several reduce their gradients after the hooks of the "
            "backward pass; leave it out, and shard the model to save memory"
        )
    if context.fisher_storage != "device":
        raise InputError("fisher_storage is for one process: leave it out, and shard the model to save memory")


def check_loaders(context: RunContext, data: Iterable[Iterable[Any]]) -> None:
    """Whether loaders that give each rank samples of its own are taken for such that give whole batches."""
    if context.ranks.size == 1 or not context.split_batches:
        return
    for loader in data:
        samplers = (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        )
        shards = type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")  # accelerate's
        if shards or any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise InputError(
                "the loaders give each rank samples of its own: set split_batches=False, or pass loaders that give "
                "every rank the whole batches"
            )


def check_counts(
    checkpointing_steps: int | None, checkpoints_total_limit: int | None, evaluate_every: int | None, log_every: int
) -> None:
    """Whether those that are given are counts; InputError if not."""
    for name, count in (
        ("checkpointing_steps", checkpointing_steps),
        ("checkpoints_total_limit", checkpoints_total_limit),
        ("evaluate_every", evaluate_every),
    ):
        if count is not None:
            check_count(name, count)
    check_count("log_every", log_every)
