"""The random number generators that a run may draw from, as plain JSON."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .errors import InputError

__all__ = ["capture", "check", "generators_of", "kept", "restore"]


def _encode(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def generators_of(data: Any) -> list[torch.Generator]:
    """Generators that a DataLoader and its samplers own, which the global state does not cover."""
    owners = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    owners.append(getattr(owners[2], "sampler", None))
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
    return found


def capture(generators: list[torch.Generator] | None = None) -> dict[str, Any]:
    """States of torch (CPU and CUDA), Python, NumPy and the given generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "generators": [_encode(generator.get_state()) for generator in generators or []],
    }


@contextlib.contextmanager
def kept(generators: list[torch.Generator] | None = None) -> Iterator[None]:
    """All of these states are afterwards what they were before, unless the block raised."""
    state = capture(generators)
    yield
    restore(state, generators)


def check(state: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Whether there is a generator for every saved one."""
    if len(state["generators"]) != len(generators):
        raise InputError(
            f"the data had {len(state['generators'])} generators of its own when the checkpoint was made and has "
            f"{len(generators)} now: pass the same loaders"
        )


def restore(state: dict[str, Any], generators: list[torch.Generator] | None = None) -> None:
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        for index, text in enumerate(state["cuda"][: torch.cuda.device_count()]):  # there may have been more
            torch.cuda.set_rng_state(_decode(text), index)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for generator, text in zip(generators or [], state["generators"], strict=True):
        generator.set_state(_decode(text))
