"""Makes trained PyTorch networks forget: fused operators, saliency, unlearning methods, evaluation.

>>> from unlearn_ext import Unlearner
>>> from unlearn_ext.methods import SFRon
>>> from unlearn_ext.tasks import Classification
>>> method = SFRon.preset("cifar10-resnet18")
>>> result = Unlearner(model, task=Classification(), method=method).run(forget=..., retain=...)  # doctest: +SKIP
"""

from .errors import InputError, NonFiniteError, ProtectionError, UnlearnError, UnlearningWarning
from .optim import UnlearnOptimizer
from .saliency import FisherDiagonal, SaliencyMask
from .unlearner import Result, Unlearner

__version__ = "0.1.0"
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
]
