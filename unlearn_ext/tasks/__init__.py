"""How a batch becomes per-sample losses, whatever the method."""

from .base import Task
from .class_diffusion import ClassConditionalDiffusion
from .classification import Classification
from .text_diffusion import TextConditionalDiffusion

__all__ = ["ClassConditionalDiffusion", "Classification", "Task", "TextConditionalDiffusion"]
