"""Bad Teacher: towards a network that knows nothing on what is forgotten, and the original one on what is kept."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..distributed.hashing import weights_hash
from ..errors import InputError
from ..utils.arguments import check_number
from . import schedules
from .forgetting import Forgetting
from .row import Row
from .values import ForgetLoss

__all__ = ["BadTeacher"]


@dataclass(kw_only=True)
class BadTeacher(Forgetting):
    r"""Bad Teacher, arXiv 2205.08096: joint descent of α times the mean distance to a random network on the forget set
    and the mean distance to the original network on the retain set, distances being :math:`T^2 \mathrm{KL}` of softened
    predictions, or squared errors of noise predictions.

    The paper takes one mean over batches mixed of both sets, where every sample counts alike. So it is here, with
    :math:`n_f` forget and :math:`n_r` retain samples in a pass, where :math:`\alpha = n_f / n_r` and ``forget_freq`` is
    1: each mean is of a batch of one set.

    Args:
        forget_alpha: α at the start; None: :math:`n_f / n_r`.
        temperature: T, for classifiers.
        random_model: the random network, for models whose modules cannot draw their weights anew by
            ``reset_parameters``. It is copied and put in eval mode.
        seed: of its weights otherwise, from 0 to 2^64 - 1.
    """

    name: ClassVar[str] = "bad_teacher"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="α distance to a random network",
        retain_term="distance to the original",
        geometry="joint: both gradients at the same weights",
        source="arXiv 2205.08096",
    )
    forget_teacher: ClassVar[str | None] = "random"
    retain_teacher: ClassVar[str | None] = "original"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {"rule": "momentum", "momentum": 0.9, "weight_decay": 5e-4, "lr": 0.02, "epochs": 10},
    }

    lr: float = 0.02
    update: str = "joint"
    forget_alpha: float | str | None = None
    temperature: float = 1.0
    random_model: nn.Module | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.forget_alpha
        self.forget_alpha = 1.0 if given is None else given  # what numbers have to be, None need not
        super().__post_init__()
        self.forget_alpha = given
        check_number("temperature", self.temperature, "a finite number above 0", lambda x: 0.0 < x < math.inf)
        seed = self.seed
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
            raise InputError(f"seed: expected an integer from 0 to 2^64 - 1, got {seed!r}")
        self._ratio = 1.0  # forget samples for each retain sample

    def take_sizes(self, sizes: Mapping[str, int]) -> None:
        self._ratio = sizes["forget"] / sizes["retain"]

    def state(self) -> dict[str, Any]:
        return {"ratio": self._ratio} if self.forget_alpha is None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._ratio = state.get("ratio", 1.0)

    def settings(self) -> dict[str, Any]:
        given = self.random_model
        return {**super().settings(), "random_model": given and weights_hash(given.named_parameters())}

    def distance_settings(self, side: str) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def strength(self, iteration: int) -> float:
        start = self._ratio if self.forget_alpha is None else self.forget_alpha
        return start * schedules.factor(self.forget_schedule, iteration, self.iterations)

    def forget_loss(self, losses: Tensor, iteration: int, distances: Tensor) -> ForgetLoss:
        return ForgetLoss(self.strength(iteration) * distances.mean())

    def retain_loss(self, losses: Tensor, iteration: int, distances: Tensor) -> Tensor:
        return distances.mean()
