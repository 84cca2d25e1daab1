"""What a run will take: memory by part and stage, and time, from the sizes of tensors and one trial batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._checkpoint import model_tensors
from .._names import trainable
from ..methods import Method

__all__ = ["Estimate", "Trial", "estimate", "sizes_on_disk", "try_batch"]

_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Trial:
    """One batch, forward and backward: bytes that autograd keeps for the backward pass, and seconds."""

    activations: int
    seconds: float


@dataclass
class Estimate:
    """Bytes by stage and part, and seconds by stage.

    Attributes:
        memory: stage -> part -> bytes that are held at once.
        seconds: stage -> seconds.
        disk: bytes that will be written: what -> bytes.
    """

    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.memory.values())


def try_batch(model: nn.Module, loss: Callable[[], Tensor]) -> Trial:
    """Runs ``loss`` forward and backward twice, and leaves no gradient. The second run is the one that is timed.

    Counted is each storage that autograd saves once, parameters not among them.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = 0.0
    for _ in range(2):
        saved.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
        if value.device.type == "cuda":
            torch.cuda.synchronize(value.device)
        seconds = time.perf_counter() - started
        for p in model.parameters():
            p.grad = None
    return Trial(sum(saved.values()), seconds)


def estimate(
    model: nn.Module,
    others: Iterable[nn.Module],
    method: Method,
    trial: Trial,
    *,
    fisher_batches: int,
    fisher_passes: int = 1,
    accumulation: int = 1,
    ema: bool = False,
) -> Estimate:
    """Memory and time of the Fisher passes and of the iterations.

    Args:
        others: networks that stay in memory beside the model: an encoder, a text encoder.
        trial: of one batch.
        fisher_batches: of both sets together.
        fisher_passes: forward passes in a Fisher batch, 2 with guidance.
        accumulation: batches in a step.
        ema: whether moving averages are kept.
    """
    trained = list(trainable(model).values())
    gradients, state, words = sum(map(_bytes, trained)), _state_bytes(trained), _words_bytes(trained)
    network = {
        "weights": sum(map(_bytes, model.parameters())) + sum(map(_bytes, model.buffers())),
        "other networks": sum(_bytes(p) for other in others for p in other.parameters()),
    }
    own = {
        "gradients": gradients * (2 if method.update == "joint" else 1),
        **_kept(trained, method, ema),
        "activations": trial.activations,
    }
    result = Estimate()
    if method.needs_fisher:
        result.memory["Fisher"] = {
            **network,
            "gradients": gradients,
            "Fisher sums": 2 * state,
            "activations": trial.activations * fisher_passes,
        }
        result.memory["mask"] = {**network, "Fisher sums": 2 * state, "mask bits": words}
        result.seconds["Fisher"] = trial.seconds * fisher_batches * fisher_passes
    result.memory["iterations"] = {**network, **own}
    forgets = -(-method.iterations // method.forget_freq)
    result.seconds["iterations"] = trial.seconds * accumulation * (forgets + method.iterations)
    return result


def sizes_on_disk(model: nn.Module, method: Method, *, ema: bool = False, checkpoints: int = 0) -> dict[str, int]:
    """Bytes of the mask and of ``checkpoints`` checkpoints, where there are any: what -> bytes."""
    kept = _kept(list(trainable(model).values()), method, ema)
    each = sum(map(_bytes, model_tensors(model).values())) + sum(kept.values())
    found = {"mask": kept["mask bits"], "checkpoints": checkpoints * each}
    return {what: size for what, size in found.items() if size}


def _kept(trained: Sequence[Tensor], method: Method, ema: bool) -> dict[str, int]:
    """Bytes that the iterations keep beside the network, and checkpoints with it: part -> bytes."""
    state = _state_bytes(trained)
    moments = _MOMENTS[method.rule] + (_MOMENTS[method.forget_rule or method.rule] if method.dual_state else 0)
    return {
        "moments": state * moments,
        "slow weights": state if method.slow_rate != 1.0 else 0,
        "mask bits": _words_bytes(trained) if method.needs_fisher or method.mask is not None else 0,
        "averages": state if ema else 0,
    }


def _state_bytes(trained: Iterable[Tensor]) -> int:
    """Of one number for each weight, as the optimizer keeps it."""
    return sum(p.numel() * (8 if p.dtype == torch.float64 else 4) for p in trained)


def _words_bytes(trained: Iterable[Tensor]) -> int:
    return sum(4 * -(-p.numel() // 32) for p in trained)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
