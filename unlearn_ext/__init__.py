"""Makes trained PyTorch networks forget: fused operators, saliency, unlearning methods, evaluation.

>>> from unlearn_ext import Unlearner
>>> from unlearn_ext.methods import SFRon
>>> from unlearn_ext.tasks import Classification
>>> method = SFRon.preset("cifar10-resnet18")
>>> result = Unlearner(model, task=Classification(), method=method).run(forget=..., retain=...)  # doctest: +SKIP
"""

from .errors import InputError, NonFiniteError, ProtectionError, UnlearnError, UnlearningWarning
from .optim import UnlearnOptimizer
from .run.unlearner import Result, Unlearner
from .saliency import FisherDiagonal, SaliencyMask
from .version import __version__

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
