"""What may be given away: noised weights and their certificate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.hashing import raw_bytes
from ..errors import InputError
from ..utils.files import atomic_path, user_path, writable_directory, writing
from ..utils.reading import explain_open_errors
from ..utils.seal import SEAL, damage, label_of, seal

__all__ = ["CERTIFICATE", "WEIGHTS", "Publication", "tensors_sha256"]

_OLDER = "unlearn_ext.certificate.1"  # without SHA256SUMS
_LABEL = "publication"
WEIGHTS, CERTIFICATE = "weights.safetensors", "certificate.json"


def tensors_sha256(*tensors: Tensor) -> str:
    """Over the bytes of one after another, in C order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


@dataclass(frozen=True)
class Publication:
    """One publication.

    Attributes:
        weights: float64 ``[features, classes]``, with noise.
        certificate: every constant, where it comes from, and what is and is not covered; JSON values only.
    """

    weights: Tensor
    certificate: dict[str, Any]

    def __repr__(self) -> str:
        c = self.certificate
        return f"Publication(number {c['publication']['number']}, certified={c['certified']})"

    def logits(self, features: Tensor) -> Tensor:
        """float64 ``[n, classes]``."""
        return features.to(torch.float64) @ self.weights

    def save(self, directory: str | Path) -> None:
        """Writes ``weights.safetensors``, ``certificate.json``, and the hashes of both as ``SHA256SUMS``.

        An earlier publication in the directory is replaced.

        Raises:
            InputError: the directory cannot be written, or holds a file of one of these names that belongs to something
                else. Nothing is written then.
        """
        from safetensors.torch import save_file

        directory = writable_directory(directory)
        there = [name for name in (SEAL, WEIGHTS, CERTIFICATE) if (directory / name).exists()]
        if there and label_of(directory) != _LABEL:
            raise InputError(
                f"{directory}: its {there[0]} is of no publication and would be overwritten: choose another directory"
            )
        with atomic_path(directory / WEIGHTS) as partial:
            save_file({"weights": self.weights.contiguous()}, partial, metadata={"format": "pt"})
        with atomic_path(directory / CERTIFICATE) as partial:
            partial.write_text(json.dumps(self.certificate, indent=2) + "\n")
        with writing(directory / SEAL):
            seal(directory, _LABEL, (WEIGHTS, CERTIFICATE))

    @classmethod
    def load(cls, directory: str | Path) -> Publication:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: a file is missing or not as it was written, or the certificate is that of other weights.
        """
        directory = user_path(directory)
        with explain_open_errors(directory / SEAL, directory / WEIGHTS, directory / CERTIFICATE):
            return cls._load(directory)

    @classmethod
    def _load(cls, directory: Path) -> Publication:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        sealed = (directory / SEAL).exists()
        if sealed and (what := damage(directory, _LABEL)) is not None:
            raise InputError(
                f"{directory} holds no publication that can be read: {what}; take another copy, or publish again"
            )
        try:
            weights = load_file(directory / WEIGHTS)["weights"]
            certificate = json.loads((directory / CERTIFICATE).read_text())
            expected = certificate["weights_sha256"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{directory} holds no publication that can be read: {error!r}") from None
        if not sealed and certificate.get("format") != _OLDER:
            raise InputError(f"{directory}: its {SEAL} is missing; take another copy, or publish again")
        if tensors_sha256(weights) != expected:
            raise InputError(f"{directory}: the certificate is that of other weights: publish again")
        return cls(weights, certificate)
