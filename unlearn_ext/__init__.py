"""Makes trained PyTorch networks forget: fused operators, saliency, unlearning methods, evaluation.

>>> from unlearn_ext import Unlearner
>>> from unlearn_ext.methods import SFRon
>>> from unlearn_ext.tasks import Classification
>>> method = SFRon.preset("cifar10-resnet18")
>>> result = Unlearner(model, task=Classification(), method=method).run(forget=..., retain=...)  # doctest: +SKIP

Importing the package loads no torch; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import InputError, NonFiniteError, ProtectionError, UnlearnError, UnlearningWarning
from .version import __version__

if TYPE_CHECKING:
    from .optim import UnlearnOptimizer
    from .run.result import Result
    from .run.unlearner import Unlearner
    from .saliency import FisherDiagonal, SaliencyMask

__all__ = [
    "FisherDiagonal",
    "InputError",
    "NonFiniteError",
    "ProtectionError",
    "Result",
    "SaliencyMask",
    "UnlearnError",
    "UnlearnOptimizer",
    "Unlearner",
    "UnlearningWarning",
    "__version__",
]

_ROOMS = {"FisherDiagonal": "saliency", "SaliencyMask": "saliency", "UnlearnOptimizer": "optim"}
_ROOMS |= {"Result": "run.result", "Unlearner": "run.unlearner"}
_MODULES = ("data", "evaluation", "methods", "ops", "optim", "saliency", "tasks")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        value = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_MODULES})
