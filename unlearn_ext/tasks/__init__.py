"""How a batch becomes per-sample losses, whatever the method."""

from .base import Task, check_per_sample, check_task
from .batches import holds_integers
from .class_diffusion import ClassConditionalDiffusion
from .classification import Classification
from .text_diffusion import TextConditionalDiffusion

__all__ = ["ClassConditionalDiffusion", "Classification", "Task", "TextConditionalDiffusion"]
__all__ += ["check_per_sample", "check_task", "holds_integers"]
