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

from ..distributed.hashing import weights_hash
from ..utils.files import atomic_path
from .keys import file_key, machine, tensor_hash
from .splits import Samples, Split
from .stopwatch import Seconds, stopwatch
from .workload import Workload

__all__ = ["ROLES", "References", "Trained"]

# Each has initial weights and an order of samples of its own, by what is added to the seed: the gold standard must not
# be the original by luck.
ROLES = {"original": 0, "retrained": 1000, "retrained_again": 2000}


@dataclass
class Trained:
    """A model in eval mode, and the seconds that its training took, when it was trained."""

    model: nn.Module
    seconds: Seconds


class References:
    """The three models of one seed.

    Args:
        directory: where they are kept, as safetensors.
        workload: the network and its training.
        split: of the seed.
        progress: called with the stage, the steps done and the steps in all.
        tell: called with a sentence about a file that is damaged.
        fresh: each model is trained again, whatever is kept.
    """

    def __init__(
        self,
        directory: Path,
        workload: Workload,
        split: Split,
        seed: int,
        *,
        progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        tell: Callable[[str], None] = lambda sentence: None,
        fresh: bool = False,
    ):
        self.directory, self.workload, self.split, self.seed = directory, workload, split, seed
        self.progress, self.tell, self.fresh = progress, tell, fresh
        self._models: dict[str, Trained] = {}

    def ingredients(self, role: str) -> dict[str, Any]:
        """Everything that the weights, and the seconds they took, depend on."""
        data = self._samples(role)
        return {
            "data": self.workload.data_hash,
            "samples": tensor_hash(data.indices),  # their order counts as well
            "seed": self.seed + ROLES[role],
            "architecture": repr(self.workload.network(0)),
            "training": dict(self.workload.training),
            **machine(self.workload.device),
        }

    def key(self, role: str) -> str:
        return file_key(self.ingredients(role))

    def __getitem__(self, role: str) -> Trained:
        """The model, from memory, from its file, or trained now."""
        if role not in self._models:
            ingredients = self.ingredients(role)
            path = self.directory / f"{role}-seed{self.seed}-{file_key(ingredients)}.safetensors"
            self._models[role] = self._load(path) or self._train(role, path, ingredients)
        return self._models[role]

    def _samples(self, role: str) -> Samples:
        split = self.split
        if role != "original":
            return split.retain
        parts = zip(*((s.images, s.labels, s.indices) for s in (split.forget, split.retain)), strict=True)
        return Samples(*(torch.cat(pair) for pair in parts))

    def _train(self, role: str, path: Path, ingredients: dict[str, Any]) -> Trained:
        from safetensors.torch import save_file

        workload, stage = self.workload, f"seed {self.seed}: training {role.replace('_', ' ')}"
        workload.warm_up()
        with stopwatch(workload.device) as seconds:
            model = workload.network(ingredients["seed"])
            workload.train(
                model,
                self._samples(role),
                ingredients["seed"],
                lambda done, total: self.progress(stage, done, total),
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
        """None where there is no file to be used, or one that is damaged."""
        from safetensors import SafetensorError, safe_open

        if self.fresh or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = self.workload.network(0)
            named = [(name, tensors[name]) for name in model.state_dict()]
            if weights_hash(named) != metadata["weights_hash"]:
                raise ValueError("its weights are not those that were written")
            model.load_state_dict(tensors)
            seconds = Seconds(**json.loads(metadata["seconds"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            self.tell(f"{path.name} is damaged: trained again")
            return None
        return Trained(model.to(self.workload.device).eval(), seconds)
