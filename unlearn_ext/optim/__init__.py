"""UnlearnOptimizer: a torch.optim.Optimizer whose step is the fused unlearning update."""

from .optimizer import StepConfig, UnlearnOptimizer

__all__ = ["StepConfig", "UnlearnOptimizer"]
