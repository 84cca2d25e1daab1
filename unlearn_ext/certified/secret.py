"""What must not be given away: the weights before noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._files import atomic_path, writable_directory
from ..errors import InputError

__all__ = ["SecretState"]

_FORMAT = "unlearn_ext.secret_state.1"


@dataclass(repr=False, eq=False)
class SecretState:
    """The state that deletion goes on from. It never shows its weights, and leaves the process by :meth:`save` alone.

    Attributes:
        weights: float64 ``[features, classes]``, without noise.
        remaining: int64, the numbers of the samples that are left, ascending.
    """

    weights: Tensor
    remaining: Tensor

    def __repr__(self) -> str:
        return f"SecretState({len(self.remaining)} samples, weights hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError("the secret state is not to be pickled or copied: write it with save_secret")

    def save(self, path: str | Path, header: dict[str, Any]) -> None:
        """Writes a safetensors file that only its owner may read."""
        from safetensors.torch import save_file

        writable_directory(Path(path).parent)
        tensors = {"weights": self.weights.contiguous(), "remaining": self.remaining.contiguous()}
        with atomic_path(path, private=True) as partial:
            save_file(tensors, partial, metadata={"format": _FORMAT, "header": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> tuple[SecretState, dict[str, Any]]:
        """The state and the header.

        Raises:
            InputError: no such file, or not a secret state.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"there is no secret state at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InputError(f"{path} is not a secret state of this package: write one with save_secret")
                state = cls(file.get_tensor("weights"), file.get_tensor("remaining"))
                header = json.loads(metadata["header"])
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({error!r})") from None
        if state.weights.dtype != torch.float64 or state.remaining.dtype != torch.int64:
            raise InputError(f"{path} is damaged: expected float64 weights and int64 sample numbers")
        return state, header
