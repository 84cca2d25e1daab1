"""What every task offers to methods and to the unlearner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.arguments import check_instance, describe

__all__ = ["Task", "check_per_sample", "check_task"]


class Task(ABC):
    """A task knows batches, losses and outputs; it knows nothing of masks, schedules or methods.

    A *raw* batch is what a loader gives, and goes to :meth:`begin`, :meth:`check`, :meth:`check_replacement`,
    :meth:`inputs`, :meth:`size` and :meth:`prepare`. A *prepared* batch is what :meth:`prepare` makes of it, and goes
    to all losses and to :meth:`hits`. On several ranks that share batches, and for Fisher diagonals of single samples,
    a prepared batch has to be a tensor, or a tuple, list or dict of tensors, whose first dimension is N.

    A task of your own needs :meth:`prepare`, :meth:`losses` and :meth:`inputs`; what else it offers says which methods
    it runs with.
    """

    kind: ClassVar[str] = ""  # by which methods say what they run on; an own task may leave it empty

    def begin(self, model: nn.Module, batch: Any) -> None:  # noqa: B027 - optional
        """Called with the first raw batch of a pass and with each of another shape or dtype, after it with those of the
        longest texts and the largest integers, and with one that raised an error, to learn from the model what batches
        must fit. Raises InputError for one that the model does not take."""

    def check(self, batch: Any) -> None:  # noqa: B027 - optional
        """Raises InputError for a raw batch that does not fit; draws nothing and moves nothing."""

    def check_replacement(self, batch: Any) -> None:  # noqa: B027 - optional
        """Raises InputError for a raw forget batch that does not say what shall stand in its place.

        Called after :meth:`check`, in the first pass over the data, where the method replaces.
        """

    @abstractmethod
    def prepare(self, batch: Any, device: torch.device) -> Any:
        """A raw batch checked, on the device, with everything random in it drawn; of as many samples."""

    @abstractmethod
    def losses(self, model: Any, batch: Any) -> Tensor:
        """Per-sample losses of a prepared batch, shape [N]; ``model`` is a module, or a function of its arguments."""

    def fisher_losses(self, model: Any, batch: Any) -> Tensor:
        """Per-sample losses of a prepared batch, whose squared gradients are the Fisher diagonal."""
        return self.losses(model, batch)

    def replacement_losses(self, model: Any, batch: Any) -> Tensor:
        """Per-sample losses, shape [N], of a prepared forget batch towards what shall stand in its place."""
        raise InputError(
            f"{type(self).__name__} has no replacement for what is forgotten: choose a method that needs none"
        )

    def losses_and_distances(
        self, model: Any, teacher: nn.Module, batch: Any, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """:meth:`losses`, and per-sample distances of the model's outputs to those of a frozen ``teacher``, both [N]
        and of one forward pass of the model. ``settings`` say how they are measured."""
        raise InputError(
            f"{type(self).__name__} measures no distance to another network: choose a method that needs none"
        )

    def check_accuracy(self) -> None:
        """Raises InputError for a task that has no :meth:`hits` and :meth:`wrong_loss`."""
        raise InputError(f"{type(self).__name__} has no accuracy to be brought to a target: leave target_accuracy out")

    def hits(self, model: Any, batch: Any) -> Tensor:
        """Bool, shape [N]: which samples of a prepared batch are got right."""
        raise NotImplementedError

    def wrong_loss(self) -> float:
        """No sample of a larger loss is got right. Called once a batch has been seen."""
        raise NotImplementedError

    def generators(self) -> list[torch.Generator]:
        """The task's own generators, whose states belong to a checkpoint."""
        return []

    @abstractmethod
    def inputs(self, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The samples of a raw batch, by which duplicates are found: a tensor, or a dict of tensors, whose first
        dimension is N."""

    def size(self, batch: Any) -> int:
        """N, the number of samples of a raw batch.

        Raises:
            InputError: :meth:`inputs` gives no tensors whose first dimension can be N.
        """
        inputs = self.inputs(batch)
        parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
            raise InputError(
                f"{type(self).__name__}.inputs: expected a tensor, or a dict of tensors, whose first dimension is the "
                f"samples, got {describe(inputs)}"
            )
        return parts[0].shape[0]


def check_per_sample(values: Any, count: int, what: str = "loss") -> None:
    """Raises InputError unless ``values`` are ``count`` numbers: of a floating dtype, or bools where they are ``hits``.
    What has another shape could be averaged all the same, to something else."""
    fits = isinstance(values, Tensor) and values.shape == (count,)
    if fits and (values.dtype == torch.bool if what == "hits" else values.is_floating_point()):
        return
    got = f"shape {list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else describe(values)
    samples = "1 sample" if count == 1 else f"{count} samples"
    name, right = what, 'one floating-point number per sample (reduction="none")'
    if what == "hits":
        name, right = "task's hits", "one bool per sample"
    raise InputError(f"the {name} returned {got} for {samples}: return {right}")


def check_task(task: Any) -> None:
    """Raises InputError, which says what to do, unless ``task`` is a :class:`Task`."""
    check_instance("task", task, Task, "unlearn_ext.tasks.Classification()")
