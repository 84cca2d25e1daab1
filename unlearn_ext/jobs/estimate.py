"""What a run will take: memory by part and stage, and time, from the sizes of tensors and trials of single batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..data.latents import ENCODED_AT_ONCE, SHARD_BYTES, latents_size
from ..distributed.wrappers import trainable
from ..evaluation.inception import PICTURES_AT_ONCE
from ..methods import Method
from ..models.judge import JUDGED_AT_ONCE
from ..models.sampling import DECODED_AT_ONCE, SAMPLED_AT_ONCE
from ..run.checkpoint import model_tensors
from .trial import Trial, held_tensors

__all__ = ["Estimate", "Trials", "Workload", "estimate", "sizes_on_disk"]

_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes by stage and part, and seconds by stage.

    Attributes:
        device: where the model is. Memory is that device's: what a run on a GPU holds on the CPU is not in it. Tensors
            and decoded pictures are counted, not what operators use as scratch, nor freed blocks that an allocator
            keeps from the system.
        memory: stage -> part -> bytes that are held at once. ``activations`` is whatever a trial held at its peak
            beside the other parts; where gradients are a part, activations are what goes beyond all of them.
        seconds: stage, by the name that it has in a run's result -> seconds.
        disk: bytes that will be written: what -> bytes.
    """

    device: torch.device
    memory: dict[str, dict[str, int]]
    seconds: dict[str, float]
    disk: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.memory.values())


@dataclass(frozen=True)
class Trials:
    """Of one batch each; None for what a run does not do.

    Attributes:
        forget, retain: of the iterations; ``fisher`` of the batches that are measured.
        encode: pictures through the VAE, of at most ``ENCODED_AT_ONCE``; ``decode``: back again.
        sample: one step, of at most ``SAMPLED_AT_ONCE`` pictures.
        judge: at most ``JUDGED_AT_ONCE`` pictures; ``features``: at most ``PICTURES_AT_ONCE`` through Inception.
        read_seconds: for one picture's file to be decoded.
    """

    forget: Trial
    retain: Trial
    sample: Trial
    fisher: Trial | None = None
    encode: Trial | None = None
    decode: Trial | None = None
    judge: Trial | None = None
    features: Trial | None = None
    read_seconds: float | None = None


@dataclass(frozen=True)
class Workload:
    """What a run reads and makes.

    Attributes:
        read: how many images it uses.
        held: bytes of memory that pictures, once decoded, take for the whole run.
        sampled: how many pictures it makes before, and again after.
        steps: of sampling.
        shape, latent_shape: [C, H, W] of a picture, and of what the denoiser takes.
        fisher_batches: of both sets together.
        waiting: bytes of retain batches that are held until the first step.
        accumulation: batches in a step.
        ema: whether moving averages are kept.
        in_backward: whether each gradient is used in the backward pass and freed.
        fisher_storage: where the forget set's Fisher sums wait.
        checkpoints: whether any are written.
        real, generated: pictures whose features are compared: real ones, and made ones before, and again after.
        features: numbers of each.
    """

    read: int
    held: int
    sampled: int
    steps: int
    shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    fisher_batches: int
    waiting: int = 0
    accumulation: int = 1
    ema: bool = False
    in_backward: bool = False
    fisher_storage: str = "device"
    checkpoints: bool = False
    real: int = 0
    generated: int = 0
    features: int = 0


def estimate(
    model: nn.Module,
    others: Iterable[nn.Module],
    method: Method,
    trials: Trials,
    work: Workload,
    disk: dict[str, int],
) -> Estimate:
    """Memory and time of every stage.

    Args:
        others: networks that stay in memory beside the model: VAE, text encoder, classifier, Inception.
        disk: what will be written.
    """
    device = next(model.parameters()).device
    memory = _memory(model, others, method, trials, work)
    return Estimate(device, memory, _seconds(method, trials, work), disk)


def _seconds(method: Method, trials: Trials, work: Workload) -> dict[str, float]:
    def all_of(trial: Trial | None, count: int, at_once: int) -> float:
        return 0.0 if trial is None or not count else trial.seconds * count / min(count, at_once)

    seconds: dict[str, float] = {}
    reading = (trials.read_seconds or 0.0) * work.read
    if trials.encode is not None:  # in one go
        seconds["encoding"] = reading + all_of(trials.encode, work.read, ENCODED_AT_ONCE)
    elif trials.read_seconds is not None:
        seconds["decoding"] = reading
    if trials.features is not None:
        real = (trials.read_seconds or 0.0) * work.real
        seconds["FID_real"] = real + all_of(trials.features, work.real, PICTURES_AT_ONCE)
    sampling = work.steps * all_of(trials.sample, work.sampled, SAMPLED_AT_ONCE)
    sampling += all_of(trials.decode, work.sampled, DECODED_AT_ONCE)
    seconds["sampling_before"] = sampling
    if trials.fisher is not None:
        seconds["fisher"] = trials.fisher.seconds * work.fisher_batches
    forgets = sum(map(method.forgets_at, range(method.iterations)))
    loop = trials.forget.seconds * forgets + trials.retain.seconds * method.iterations
    seconds["unlearning"] = loop * work.accumulation
    seconds["sampling_after"] = sampling
    if trials.judge is not None:
        seconds["judging"] = 2 * all_of(trials.judge, work.sampled, JUDGED_AT_ONCE)
    if trials.features is not None:
        seconds["FID"] = 2 * all_of(trials.features, work.generated, PICTURES_AT_ONCE)
    return seconds


def _memory(
    model: nn.Module, others: Iterable[nn.Module], method: Method, trials: Trials, work: Workload
) -> dict[str, dict[str, int]]:
    host = partial(_on_host, next(model.parameters()).device.type == "cpu")
    trained = trainable(model)
    weights = sum(map(_bytes, held_tensors([model])))
    network = {"weights": weights, "other networks": sum(map(_bytes, held_tensors([model, *others]))) - weights}
    picture, real = 4 * math.prod(work.shape), host(4 * work.features * work.real)
    stages: dict[str, dict[str, int]] = {}
    if trials.encode is not None:
        # The next batch is decoded while one is encoded; a file's latents are joined to be written.
        ahead = picture * min(work.read, ENCODED_AT_ONCE)
        latents = min(SHARD_BYTES, latents_size(work.latent_shape, work.read))
        stages["encoding"] = {
            **network,
            "pictures": host(work.held + ahead + latents),
            "activations": max(trials.encode.peak, host(latents)),
        }
    training = {**network, "pictures": host(work.held + work.sampled * picture), "features": real}
    size = max if work.in_backward else sum  # of one weight's gradient at a time, or of all
    gradients = size(map(_bytes, trained.values()))
    if trials.fisher is not None:
        stages |= _fisher_memory(trained, method, trials.fisher, work, training, gradients)
    kept = _kept(trained, method, work.ema)
    # A checkpoint is written from a copy of the model, when gradients and activations are gone.
    copied = sum(map(_bytes, model_tensors(model).values())) if work.checkpoints else 0
    stages["iterations"] = {
        **training,
        "gradients": gradients * (2 if method.update == "joint" else 1),
        **kept,
        "activations": max(0, max(trials.forget.peak, trials.retain.peak, copied) - gradients),
    }
    after = {"mask bits": host(kept["mask bits"]), "averages": kept["averages"], "features": real}
    # Pictures are made in float32.
    network["weights"] += sum(2 * p.numel() for p in trained.values() if p.dtype == torch.bfloat16)
    return stages | _picture_memory(trials, work, network, after, host)


def _on_host(on_host: bool, size: int) -> int:
    """Of what is on the CPU wherever the model is: its size where that is the device whose memory is counted."""
    return size if on_host else 0


def _fisher_memory(
    trained: Mapping[str, Tensor],
    method: Method,
    trial: Trial,
    work: Workload,
    training: Mapping[str, int],
    gradients: int,
) -> dict[str, dict[str, int]]:
    """Of the Fisher pass and of the mask that is made from it.

    Args:
        training: what is in memory as well.
    """
    on_host = next(iter(trained.values())).device.type == "cpu"
    state, words = _state_bytes(trained.values()), _words_bytes(trained.values())
    # On the CPU, the host's memory is the device's.
    away = work.fisher_storage == "disk" or (work.fisher_storage == "host" and not on_host)
    sums = state if away else 2 * state
    waiting = _on_host(on_host, work.waiting)
    mask = {**training, "pictures": training["pictures"] + waiting, "Fisher sums": sums}
    if method.mask_fraction is not None:
        mask["mask bits"] = words if on_host else 2 * words  # copied to the host as one tensor
        # The order that ties are broken in.
        mask["Fisher sums"] += _state_bytes(p for p in trained.values() if not p.is_contiguous())
    else:  # tensor by tensor
        mask["Fisher sums"] += max(_state_bytes([p]) for p in trained.values()) if away else 0
        mask["mask bits"] = _on_host(on_host, words)
    activations = max(0, trial.peak - gradients)
    fisher = {**training, "gradients": gradients, "Fisher sums": sums, "activations": activations}
    return {"Fisher": fisher, "mask": mask}


def _picture_memory(
    trials: Trials,
    work: Workload,
    network: Mapping[str, int],
    after: Mapping[str, int],
    host: Callable[[int], int],
) -> dict[str, dict[str, int]]:
    """Of sampling, judging and the distance to real images.

    Args:
        network, after: what is in memory as well.
    """
    sampled, latent = work.sampled * 4 * math.prod(work.shape), 4 * math.prod(work.latent_shape)
    # Before and after; noise and what comes of it, which are the pictures themselves where there is no VAE.
    pictures = 2 * sampled + (2 * work.sampled * latent if trials.decode is not None else sampled)
    through_vae = 0 if trials.decode is None else trials.decode.peak
    stages = {
        "sampling": {
            **network,
            "pictures": host(work.held + pictures),
            **after,
            "activations": max(trials.sample.peak, through_vae, host(sampled)),  # the last: all batches in one tensor
        }
    }
    both = {**network, "pictures": host(work.held + 2 * sampled), **after}
    if trials.judge is not None:
        stages["judging"] = {**both, "activations": trials.judge.peak}
    if trials.features is not None:
        # The distance is taken in float64 of features that are in float32 as well.
        compared = 8 * work.features * (work.real + work.generated)
        stages["FID"] = {**both, "activations": max(trials.features.peak, host(2 * compared))}
    return stages


def sizes_on_disk(model: nn.Module, method: Method, *, ema: bool = False, checkpoints: int = 0) -> dict[str, int]:
    """Bytes of the mask and of ``checkpoints`` checkpoints, where there are any: what -> bytes."""
    kept = _kept(trainable(model), method, ema)
    each = sum(map(_bytes, model_tensors(model).values())) + sum(kept.values())
    sizes = {"mask": kept["mask bits"], "checkpoints": checkpoints * each}
    return {what: size for what, size in sizes.items() if size}


def _kept(trained: Mapping[str, Tensor], method: Method, ema: bool) -> dict[str, int]:
    """Bytes that the iterations keep beside the network, and checkpoints with it: part -> bytes."""
    state = _state_bytes(trained.values())
    moments = _MOMENTS[method.rule] + (_MOMENTS[method.forget_rule or method.rule] if method.dual_state else 0)
    slow = (group for group in method.groups(trained.items()) if group.get("slow_rate", method.slow_rate) != 1.0)
    return {
        "moments": state * moments,
        "slow weights": sum(_state_bytes(p for _, p in group["params"]) for group in slow),
        "mask bits": _words_bytes(trained.values()) if method.needs_fisher or method.mask is not None else 0,
        "averages": state if ema else 0,
    }


def _state_bytes(trained: Iterable[Tensor]) -> int:
    """Of one number for each weight, as the optimizer keeps it."""
    return sum(p.numel() * (8 if p.dtype == torch.float64 else 4) for p in trained)


def _words_bytes(trained: Iterable[Tensor]) -> int:
    return sum(4 * -(-p.numel() // 32) for p in trained)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
