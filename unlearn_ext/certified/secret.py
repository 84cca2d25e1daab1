"""What must not be given away: the weights before noise."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.files import atomic_path, user_path, writable_directory
from ..utils.reading import explain_open_errors

__all__ = ["SecretState"]

_FORMAT = "unlearn_ext.secret_state.2"
_OLDER = "unlearn_ext.secret_state.1"  # without a hash
_UNKNOWN, _FIELD = "0" * 64, b'"sha256":"%s"'


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
        """Writes a safetensors file that only its owner may read, with the hash of all its bytes in it."""
        from safetensors.torch import save

        path = user_path(path)
        writable_directory(path.parent)
        tensors = {"weights": self.weights.contiguous(), "remaining": self.remaining.contiguous()}
        metadata = {"format": _FORMAT, "header": json.dumps(header), "sha256": _UNKNOWN}
        content = save(tensors, metadata)
        digest = hashlib.sha256(content).hexdigest().encode()
        with atomic_path(path, private=True) as partial:
            partial.write_bytes(content.replace(_FIELD % _UNKNOWN.encode(), _FIELD % digest, 1))

    @classmethod
    def load(cls, path: str | Path) -> tuple[SecretState, dict[str, Any]]:
        """The state and the header.

        Raises:
            InputError: no such file, not a secret state, or not as it was written.
        """
        from safetensors import SafetensorError, safe_open

        path = user_path(path)
        if not path.is_file():
            raise InputError(f"there is no secret state at {path}")
        try:
            with explain_open_errors(path), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (_FORMAT, _OLDER):
                    raise InputError(f"{path} is not a secret state of this package: write one with save_secret")
                if metadata["format"] == _FORMAT:
                    _check_hash(path, metadata["sha256"])
                state = cls(file.get_tensor("weights"), file.get_tensor("remaining"))
                header = json.loads(metadata["header"])
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({error!r})") from None
        if state.weights.dtype != torch.float64 or state.remaining.dtype != torch.int64:
            raise InputError(f"{path} is damaged: expected float64 weights and int64 sample numbers")
        if not state.weights.isfinite().all():
            raise InputError(f"{path} is damaged: its weights are not finite; use a copy of it")
        numbers = state.remaining
        if numbers.dim() != 1 or (numbers[:1] < 0).any() or (numbers[1:] <= numbers[:-1]).any():
            raise InputError(f"{path} is damaged: its sample numbers do not ascend; use a copy of it")
        return state, header


def _check_hash(path: Path, expected: str) -> None:
    """The hash is that of the file with zeros in its place."""
    content = path.read_bytes()
    blank = content.replace(_FIELD % expected.encode(), _FIELD % _UNKNOWN.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != expected:
        raise InputError(f"{path} is damaged: it is not as it was written; use a copy of it")
