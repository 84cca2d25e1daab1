"""The original model and two retrained ones, trained once and kept.

The second retrained model is what the first is measured by: no method can be asked to come closer to retraining than
retraining comes to itself.

The seconds that training took are kept with each model. A later comparison divides its methods' seconds by these, so
that both sides of a share were taken on machines of one description, and not always at one time: whatever else the
machine did then or does now stands in the share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..demo.network import SmallResNet
from ..demo.training import train_classifier
from ..distributed.hashing import weights_hash
from ..utils.files import atomic_path
from .keys import file_key, machine, sources_hash, tensor_hash
from .protocol import Protocol
from .splits import Samples, Split
from .timing import Seconds, stopwatch, warm_up

__all__ = ["ROLES", "Oracles", "Trained"]

# Each has initial weights and an order of samples of its own, by what is added to the seed: the gold standard must not
# be the original by luck.
ROLES = {"original": 0, "retrained": 1000, "retrained_again": 2000}
_SOURCES = ("demo/network.py", "demo/training.py", "data/digits.py")


@dataclass
class Trained:
    """A model in eval mode, and the seconds that its training took, when it was trained."""

    model: nn.Module
    seconds: Seconds


class Oracles:
    """The three models of one seed.

    Args:
        directory: where they are kept, as safetensors.
        data_hash: of all digits.
        network: makes the model to be trained, from a seed.
        progress: called with the stage, the steps done and the steps in all.
        tell: called with a sentence about a file that is damaged.
    """

    def __init__(
        self,
        directory: Path,
        protocol: Protocol,
        split: Split,
        seed: int,
        data_hash: str,
        *,
        network: Callable[[int], nn.Module] = lambda seed: SmallResNet(seed=seed),
        progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        tell: Callable[[str], None] = lambda sentence: None,
    ):
        self.directory, self.protocol, self.split, self.seed = directory, protocol, split, seed
        self.data_hash, self.network, self.progress, self.tell = data_hash, network, progress, tell
        self._found: dict[str, Trained] = {}

    def ingredients(self, role: str) -> dict[str, Any]:
        """Everything that the weights, and the seconds they took, depend on."""
        data = self._samples(role)
        return {
            "data": self.data_hash,
            "samples": tensor_hash(data.indices),  # their order counts as well
            "seed": self.seed + ROLES[role],
            "architecture": repr(self.network(0)),
            "training": {"epochs": self.protocol.epochs, "batch_size": self.protocol.batch_size},
            "sources": sources_hash(_SOURCES),
            **machine(self.protocol.device),
        }

    def key(self, role: str) -> str:
        return file_key(self.ingredients(role))

    def __getitem__(self, role: str) -> Trained:
        """The model, from memory, from its file, or trained now."""
        if role not in self._found:
            ingredients = self.ingredients(role)
            path = self.directory / f"{role}-seed{self.seed}-{file_key(ingredients)}.safetensors"
            self._found[role] = self._load(path) or self._train(role, path, ingredients)
        return self._found[role]

    def _samples(self, role: str) -> Samples:
        split = self.split
        if role != "original":
            return split.retain
        parts = zip(*((s.images, s.labels, s.indices) for s in (split.forget, split.retain)), strict=True)
        return Samples(*(torch.cat(pair) for pair in parts))

    def _train(self, role: str, path: Path, ingredients: dict[str, Any]) -> Trained:
        from safetensors.torch import save_file

        data, protocol = self._samples(role), self.protocol
        stage = f"seed {self.seed}: training {role.replace('_', ' ')}"
        warm_up(protocol.batch_size, protocol.device)
        with stopwatch(protocol.device) as seconds:
            model = train_classifier(
                self.network(ingredients["seed"]),
                data.images,
                data.labels,
                epochs=protocol.epochs,
                batch_size=protocol.batch_size,
                seed=ingredients["seed"],
                device=protocol.device,
                progress=lambda done, total: self.progress(stage, done, total),
            )
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        metadata = {
            "seconds": json.dumps(asdict(seconds)),
            "weights_hash": weights_hash(tensors.items()),
            "ingredients": json.dumps(ingredients),
        }
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata)
        return Trained(model, seconds)

    def _load(self, path: Path) -> Trained | None:
        """None where there is no file, or one that is damaged."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = self.network(0)
            named = [(name, tensors[name]) for name in model.state_dict()]
            if weights_hash(named) != metadata["weights_hash"]:
                raise ValueError("its weights are not those that were written")
            model.load_state_dict(tensors)
            seconds = Seconds(**json.loads(metadata["seconds"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            self.tell(f"{path.name} is damaged: trained again")
            return None
        return Trained(model.to(self.protocol.device).eval(), seconds)
