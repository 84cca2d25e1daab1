"""What a run is refused for before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..methods import Method

__all__ = ["check_in_backward"]


def check_in_backward(method: Method, mixed_precision: str, gradient_accumulation_steps: int) -> None:
    """Whether a run's other settings go without whole gradients; InputError if not."""
    for needed, why in (
        (method.learns, "a method that learns adds up the gradients of two sets"),
        (method.update == "joint", "update='joint' needs the gradients of both sides at once"),
        (gradient_accumulation_steps > 1, "gradient_accumulation_steps above 1 adds up whole gradients before a step"),
        (mixed_precision == "fp16", "mixed_precision='fp16' looks at all gradients before a step; use bf16 or no"),
    ):
        if needed:
            raise InputError(f"optimizer_in_backward frees each gradient at once, and {why}: leave one of them out")
