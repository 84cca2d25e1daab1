"""What a run will take: memory by part and stage, and time, from the sizes of tensors and trials of single batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._checkpoint import model_tensors
from .._names import trainable
from ..data.latents import ENCODED_AT_ONCE, SHARD_BYTES, latents_size
from ..methods import Method
from ._trial import Trial, held_tensors
from .judge import JUDGED_AT_ONCE
from .sampling import DECODED_AT_ONCE, SAMPLED_AT_ONCE

__all__ = ["Estimate", "Images", "Trials", "estimate", "sizes_on_disk"]

_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}


@dataclass
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
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

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
        judge: at most ``JUDGED_AT_ONCE`` pictures.
        picture: seconds for one picture's file to be decoded.
    """

    forget: Trial
    retain: Trial
    sample: Trial
    fisher: Trial | None = None
    encode: Trial | None = None
    decode: Trial | None = None
    judge: Trial | None = None
    picture: float | None = None


@dataclass(frozen=True)
class Images:
    """What a run reads and shows.

    Attributes:
        read: how many images it uses.
        held: bytes of memory that these take for the whole run; none where they become latents.
        shown: how many pictures it samples before, and again after.
        steps: of sampling.
        shape, latent_shape: [C, H, W] of a picture, and of what the denoiser takes.
    """

    read: int
    held: int
    shown: int
    steps: int
    shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]


def estimate(
    model: nn.Module,
    others: Iterable[nn.Module],
    method: Method,
    trials: Trials,
    images: Images,
    *,
    fisher_batches: int,
    accumulation: int = 1,
    ema: bool = False,
    checkpoints: bool = False,
) -> Estimate:
    """Memory and time of every stage.

    Args:
        others: networks that stay in memory beside the model: VAE, text encoder, classifier.
        fisher_batches: of both sets together.
        accumulation: batches in a step.
        ema: whether moving averages are kept.
        checkpoints: whether any are written.
    """
    device = next(model.parameters()).device
    result = Estimate(device)
    _add_memory(result, model, others, method, trials, images, ema, checkpoints)
    seconds = result.seconds
    decoding = (trials.picture or 0.0) * images.read
    if trials.encode is not None:  # in one go
        seconds["encoding"] = decoding + trials.encode.seconds * images.read / min(images.read, ENCODED_AT_ONCE)
    elif trials.picture is not None:
        seconds["decoding"] = decoding
    sampling = trials.sample.seconds * images.steps * images.shown / min(images.shown, SAMPLED_AT_ONCE)
    if trials.decode is not None:
        sampling += trials.decode.seconds * images.shown / min(images.shown, DECODED_AT_ONCE)
    seconds["sampling_before"] = sampling
    if trials.fisher is not None:
        seconds["fisher"] = trials.fisher.seconds * fisher_batches
    forgets = -(-method.iterations // method.forget_freq)
    each = trials.forget.seconds * forgets + trials.retain.seconds * method.iterations
    seconds["unlearning"] = each * accumulation
    seconds["sampling_after"] = sampling
    if trials.judge is not None:
        seconds["judging"] = 2 * trials.judge.seconds * images.shown / min(images.shown, JUDGED_AT_ONCE)
    return result


def _add_memory(
    result: Estimate,
    model: nn.Module,
    others: Iterable[nn.Module],
    method: Method,
    trials: Trials,
    images: Images,
    ema: bool,
    checkpoints: bool,
) -> None:
    def host(size: int) -> int:
        """Of what is on the CPU wherever the model is."""
        return size if result.device.type == "cpu" else 0

    trained = trainable(model)
    gradients = sum(map(_bytes, trained.values()))
    state, words = _state_bytes(trained.values()), _words_bytes(trained.values())
    own = held_tensors([model])
    known = {id(tensor) for tensor in own}
    network = {
        "weights": sum(map(_bytes, own)),
        "other networks": sum(_bytes(tensor) for tensor in held_tensors(others) if id(tensor) not in known),
    }
    picture, latent = 4 * math.prod(images.shape), 4 * math.prod(images.latent_shape)
    shown = images.shown * picture
    if trials.encode is not None:
        # The next batch is decoded while one is encoded; a file's latents are joined to be written.
        ahead = picture * min(images.read, ENCODED_AT_ONCE)
        latents = min(SHARD_BYTES, latents_size(images.latent_shape, images.read))
        result.memory["encoding"] = {
            **network,
            "pictures": host(images.held + ahead + latents),
            "activations": max(trials.encode.peak, host(latents)),
        }
    training = {**network, "pictures": host(images.held + shown)}
    if trials.fisher is not None:
        result.memory["Fisher"] = {
            **training,
            "gradients": gradients,
            "Fisher sums": 2 * state,
            "activations": max(0, trials.fisher.peak - gradients),
        }
        weights = sum(p.numel() for p in trained.values())
        result.memory["mask"] = {
            **training,
            "Fisher sums": 2 * state,
            "mask bits": 2 * words,  # as they are found, and in the order of a file
            "mask as bool": weights + host(weights),  # those that are unpacked, and the zeros whose place they take
        }
    kept = _kept(trained, method, ema)
    # A checkpoint is written from a copy of the model, when gradients and activations are gone.
    copied = sum(map(_bytes, model_tensors(model).values())) if checkpoints else 0
    result.memory["iterations"] = {
        **training,
        "gradients": gradients * (2 if method.update == "joint" else 1),
        **kept,
        "activations": max(0, max(trials.forget.peak, trials.retain.peak, copied) - gradients),
    }
    after = {"mask bits": host(kept["mask bits"]), "averages": kept["averages"]}
    # Before and after; noise and what comes of it, which are the pictures themselves where there is no VAE.
    generated = 2 * shown + (2 * images.shown * latent if trials.decode is not None else shown)
    decoding = 0 if trials.decode is None else trials.decode.peak
    result.memory["sampling"] = {
        **network,
        "pictures": host(images.held + generated),
        **after,
        "activations": max(trials.sample.peak, decoding, host(shown)),  # the last: all batches in one tensor
    }
    if trials.judge is not None:
        result.memory["judging"] = {
            **network,
            "pictures": host(images.held + 2 * shown),
            **after,
            "activations": trials.judge.peak,
        }


def sizes_on_disk(model: nn.Module, method: Method, *, ema: bool = False, checkpoints: int = 0) -> dict[str, int]:
    """Bytes of the mask and of ``checkpoints`` checkpoints, where there are any: what -> bytes."""
    kept = _kept(trainable(model), method, ema)
    each = sum(map(_bytes, model_tensors(model).values())) + sum(kept.values())
    found = {"mask": kept["mask bits"], "checkpoints": checkpoints * each}
    return {what: size for what, size in found.items() if size}


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
