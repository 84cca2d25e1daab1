"""A method in one line, and the kinds of task that it runs on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALL_TASKS", "CLASSIFICATION", "DIFFUSION", "Row"]

CLASSIFICATION = ("classification",)
DIFFUSION = ("class-conditional diffusion", "text-conditional diffusion")
ALL_TASKS = CLASSIFICATION + DIFFUSION


@dataclass(frozen=True)
class Row:
    """A method in one line, as the table of methods prints it.

    Attributes:
        saliency: which weights forgetting may move.
        forget_term, retain_term: what is descended; ``none`` where there is nothing.
        geometry: in which order and space the steps are taken.
        source: the paper, or where the rule was read.
        tasks: kinds of task that it runs on.
        otherwise: why it runs on no other, as the end of a sentence.
    """

    saliency: str
    forget_term: str
    retain_term: str
    geometry: str
    source: str
    tasks: tuple[str, ...] = ALL_TASKS
    otherwise: str = ""
