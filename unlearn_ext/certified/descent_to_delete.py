"""DescentToDelete: learns, deletes and publishes with a proof."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..utils.arguments import check_number
from .constants import FORMULAS, Constants
from .noise import system_normals
from .publication import Publication, tensors_sha256
from .regression import SoftmaxRegression
from .secret import SecretState

__all__ = ["DescentToDelete", "certify"]

_SOURCE = (
    'Neel, Roth, Sharifi-Malvajerdi: "Descent-to-Delete: Gradient-Based Methods for Machine Unlearning", PMLR v132, '
    "2021 (arXiv 2007.02923), the guarantee for strongly convex losses with a secret state; batches of deletions and "
    "the allowance for rounding as derived in unlearn_ext/certified/constants.py"
)
_COVERED = (
    "each publication by itself, after any sequence of deletions that was not chosen by looking at publications",
    "rounding of the descent in float64",
)
_NOT_COVERED = (
    "publications made before a sample was deleted",
    "deletions chosen by looking at publications: which samples are left can then tell of those that are not",
    "several publications seen together: see epsilon_of_all for what is left of the guarantee",
    "anyone who can read the secret state or the process's memory",
    "the training data's other copies, and anything else that was made from them",
    "this certificate itself: it tells how many samples were deleted, and its hash identifies those that are left",
    "features, classes, constants or settings that were chosen by looking at samples deleted later",
    "the privacy of samples that were not deleted: this is no differential privacy",
    "finite precision of the noise: it is an ordinary float64 Gaussian",
    "time and energy that a deletion takes",
)


def certify(
    model: Any,
    features: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    iterations: int = 50,
    batch_size: int | None = None,
    momentum: float = 0.0,
    mask: Any = None,
) -> DescentToDelete:
    """Trains a model whose deletions are (ε, δ)-unlearning, or says why that cannot be had.

    Args:
        model: a :class:`SoftmaxRegression`; nothing else is certified.
        features: floating ``[n, features]``, rows no longer than the model's ``feature_bound``.
        labels: integers ``[n]``.
        epsilon, delta: the guarantee.
        iterations: steps for each deletion; more of them need less noise.
        batch_size, momentum, mask: as other methods here have them; only their defaults are covered by the proof.

    Raises:
        InputError: what is asked for is not covered by the proof, or the data do not fit.

    Source: PMLR v132; :mod:`unlearn_ext.certified.constants` has the proof.
    """
    if not isinstance(model, SoftmaxRegression):
        raise InputError(
            f"a {type(model).__name__} cannot be certified: the proof needs a loss that is strongly convex in all "
            "weights, with known constants, which is shown for unlearn_ext.certified.SoftmaxRegression alone; unlearn "
            "it with an Unlearner and measure it against retraining"
        )
    if batch_size is not None:
        raise InputError(
            "batch_size: minibatches cannot be certified, because a step on part of the data need not come closer to "
            "the minimiser over all of them: leave it at None"
        )
    check_number("momentum", momentum, "0", lambda x: True)
    if float(momentum) != 0.0:
        raise InputError(
            "momentum cannot be certified: a step that remembers earlier gradients, those of deleted samples among "
            "them, is not the contraction that the proof rests on: leave it at 0"
        )
    if mask is not None:
        raise InputError(
            "a mask cannot be certified: weights that may not move keep what they learnt from deleted samples: leave "
            "it at None"
        )
    return DescentToDelete(model, features, labels, epsilon=epsilon, delta=delta, iterations=iterations)


class DescentToDelete:
    """Softmax regression that deletes samples by a few steps of descent on the others.

    It trains when it is made. The secret weights stay in here; :meth:`publish` gives noised ones away. Rows of deleted
    samples are dropped. Samples keep their numbers, from 0, through all deletions.

    Args:
        model, features, labels, epsilon, delta, iterations: see :func:`certify`.

    Attributes:
        model: the model.
        constants: of the guarantee, fixed at the start.
        publications: how many were made.
    """

    def __init__(
        self,
        model: SoftmaxRegression,
        features: Tensor,
        labels: Tensor,
        *,
        epsilon: float = 1.0,
        delta: float = 1e-5,
        iterations: int = 50,
    ):
        self.model = model
        self._features, self._labels = model.check_data(features, labels)
        self.constants = Constants.of(model, len(self._labels), epsilon=epsilon, delta=delta, iterations=iterations)
        self.publications = 0
        start = torch.zeros(model.features, model.classes, dtype=torch.float64, device="cpu")
        weights = self._descend(start, self._features, self._labels, self.constants.training_iterations)
        self._secret = SecretState(weights, torch.arange(self.constants.n, dtype=torch.int64, device="cpu"))

    def __repr__(self) -> str:
        c = self.constants
        return (
            f"DescentToDelete({self.samples} of {c.n} samples left, epsilon={c.epsilon:g}, delta={c.delta:g}, "
            f"{self.publications} publications)"
        )

    @property
    def samples(self) -> int:
        """How many are left."""
        return len(self._secret.remaining)

    @property
    def deleted(self) -> int:
        """How many were deleted."""
        return self.constants.n - self.samples

    @property
    def remaining(self) -> list[int]:
        """The numbers of the samples that are left."""
        return self._secret.remaining.tolist()

    # --- Deletion -------------------------------------------------------------------------------------------

    def delete(self, indices: int | Iterable[int] | Tensor) -> int:
        """Deletes samples by their numbers, all of them in one update; publish afterwards.

        Returns:
            The number of steps taken.

        Raises:
            InputError: no number, one that is unknown, deleted already or given twice, all samples, or more of them
                than the constants allow. Nothing is changed then.
        """
        chosen = self._check_indices(indices)
        left = ~torch.isin(self._secret.remaining, torch.tensor(chosen, dtype=torch.int64, device="cpu"))
        features, labels = self._features[left], self._labels[left]
        steps = self.constants.iterations_for(len(chosen))
        weights = self._descend(self._secret.weights, features, labels, steps)
        self._secret = SecretState(weights, self._secret.remaining[left])
        self._features, self._labels = features, labels
        return steps

    def _check_indices(self, indices: Any) -> list[int]:
        values = indices.tolist() if hasattr(indices, "tolist") else indices
        values = list(values) if isinstance(values, Iterable) else [values]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise InputError(f"delete: expected sample numbers, got {value!r}")
        chosen, n, seen = [int(value) for value in values], self.constants.n, set()
        if not chosen:
            raise InputError("delete: expected at least one sample number, got none")
        known = set(self.remaining)
        for index in chosen:
            if not 0 <= index < n:
                raise InputError(f"delete: there is no sample {index}: they are numbered from 0 to {n - 1}")
            if index not in known:
                raise InputError(f"delete: sample {index} has been deleted already")
            if index in seen:
                raise InputError(f"delete: sample {index} is given twice: name each once")
            seen.add(index)
        if len(chosen) == self.samples:
            raise InputError("delete: that would delete every sample and leave nothing to train on: discard the model")
        if self.deleted + len(chosen) > self.constants.max_deletions:
            raise InputError(
                f"delete: the constants hold while half of the {n} samples are left, so {self.constants.max_deletions} "
                f"can be deleted, and {self.deleted} are: train anew on those that shall stay"
            )
        return chosen

    def _descend(self, start: Tensor, features: Tensor, labels: Tensor, steps: int) -> Tensor:
        c = self.constants
        return self.model.descend(start, features, labels, steps=steps, eta=c.eta, radius=c.radius)

    # --- Publication ----------------------------------------------------------------------------------------

    def publish(self, generator: torch.Generator | None = None) -> Publication:
        """The weights with fresh noise, and their certificate.

        Args:
            generator: draws the noise instead of the system's randomness, to repeat an experiment. Whoever knows or
                guesses its seed can take the noise off again: the guarantee is void, and the certificate says so.
        """
        shape = self._secret.weights.shape
        if generator is None:
            noise = system_normals(shape)
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()
        weights = self._secret.weights + self.constants.sigma * noise
        self.publications += 1
        return Publication(weights, self._certificate(weights, seeded=generator is not None))

    def _certificate(self, weights: Tensor, seeded: bool) -> dict[str, Any]:
        from ..version import __version__

        c = self.constants
        statement = (
            f"These weights are ({c.epsilon:g}, {c.delta:g})-indistinguishable from those that training on the "
            f"{self.samples} remaining samples alone would have published with the same constants."
        )
        if seeded:
            statement = (
                "No guarantee: the noise came from a generator with a seed, and whoever knows the seed can take it off."
            )
        return {
            "format": "unlearn_ext.certificate.2",
            "certified": not seeded,
            "statement": statement,
            "source": _SOURCE,
            "method": "descent_to_delete: full-batch projected gradient descent from the weights before the deletion",
            "model": "softmax regression, L2 penalty on every weight, a bias being a feature",
            "constants": c.to_dict(),
            "formulas": FORMULAS,
            "data": {
                "samples": self.samples,
                "largest_norm": float(self._features.norm(dim=1).max()),
                "sha256": self.data_sha256(),
            },
            "deletions": {"deleted": self.deleted, "still_possible": c.max_deletions - self.deleted},
            "publication": {
                "number": self.publications,
                "noise": "a given generator" if seeded else "the system's randomness",
                "epsilon_of_all": c.epsilon_of(self.publications),
            },
            "weights_sha256": tensors_sha256(weights),
            "covered": [] if seeded else list(_COVERED),
            "not_covered": list(_NOT_COVERED),
            "software": {"unlearn_ext": __version__, "torch": torch.__version__, "backend": ops.backend("cpu")},
        }

    def data_sha256(self) -> str:
        """Of the remaining rows, float64, then their labels, int64, in the order of their numbers."""
        return tensors_sha256(self._features, self._labels)

    # --- The secret -----------------------------------------------------------------------------------------

    def save_secret(self, path: str | Path) -> None:
        """Writes the secret weights to a file of their own, which only its owner may read, to go on from later.

        Whoever has this file can undo the noise: keep it away from what is published.
        """
        c = self.constants
        header = {
            "model": {k: getattr(c, k) for k in ("features", "classes", "l2", "feature_bound")},
            "settings": {k: getattr(c, k) for k in ("n", "epsilon", "delta", "iterations")},
            "publications": self.publications,
            "data_sha256": self.data_sha256(),
        }
        self._secret.save(path, header)

    @classmethod
    def load_secret(cls, path: str | Path, features: Tensor, labels: Tensor) -> DescentToDelete:
        """Goes on from a file of :meth:`save_secret`.

        Args:
            features, labels: of the samples that were left, in the order of their numbers.

        Raises:
            InputError: the file does not fit, or the data are others.
        """
        secret, header = SecretState.load(path)
        try:
            model, settings = SoftmaxRegression(**header["model"]), dict(header["settings"])
            constants = Constants.of(model, settings.pop("n"), **settings)
            publications, expected = header["publications"], header["data_sha256"]
            if type(publications) is not int or publications < 0:
                raise ValueError(f"publications: expected a whole number, got {publications!r:.40}")
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error})") from None
        if tuple(secret.weights.shape) != (model.features, model.classes):
            raise InputError(f"{path} is damaged: its weights do not fit its model")
        self = cls.__new__(cls)
        self.model, self.constants, self.publications, self._secret = model, constants, publications, secret
        self._features, self._labels = model.check_data(features, labels)
        if len(self._labels) != self.samples or self.data_sha256() != expected:
            raise InputError(
                f"{path} belongs to other data: pass the {self.samples} rows and labels that were left, in their order"
            )
        return self
