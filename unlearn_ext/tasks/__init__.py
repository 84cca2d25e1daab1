"""How a batch becomes per-sample losses, whatever the method."""

from .base import Task
from .classification import Classification

__all__ = ["Classification", "Task"]
