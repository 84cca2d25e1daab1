"""How a batch becomes per-sample losses, whatever the method."""

from ._batches import holds_integers
from .base import Task, check_per_sample, check_task
from .class_diffusion import ClassConditionalDiffusion
from .classification import Classification
from .text_diffusion import TextConditionalDiffusion

__all__ = ["ClassConditionalDiffusion", "Classification", "Task", "TextConditionalDiffusion"]
__all__ += ["check_per_sample", "check_task", "holds_integers"]
