"""What a comparison is handed in: data, a network and its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .splits import Samples, Split

__all__ = ["Workload"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data, network and training that all methods and seeds of a comparison share.

    Attributes:
        data: name of the data.
        data_hash: hash of all samples.
        protocol: sizes, scenario and whatever else results depend on; stands in the document.
        training: what trained weights depend on beside samples, network and seed; part of ``protocol``.
        batch_size: of training, forgetting and retaining.
        held_out_size: samples set aside that nobody trains on.
        unseen_size: how many of them a method gets at least; those of a forgotten class are left out.
        device: where to compute.
        split: draws the samples of a seed.
        network: makes the network to be trained, from a seed.
        train: called as ``train(network, samples, seed, progress)``; trains in place, leaves it in eval mode on the
            device, and calls ``progress(done, total)`` with steps.
        warm_up: does one step of training and of unlearning, once in a process; the first one loads libraries, and
            whatever was timed first would pay for that.
    """

    data: str
    data_hash: str
    protocol: Mapping[str, Any]
    training: Mapping[str, Any]
    batch_size: int
    held_out_size: int
    unseen_size: int
    device: str
    split: Callable[[int], Split]
    network: Callable[[int], nn.Module]
    train: Callable[[nn.Module, Samples, int, Callable[[int, int], None]], object]
    warm_up: Callable[[], None]
