"""Which weights of a denoiser are trained, and the embedders that a DiT's blocks share in the paper's layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase, translate

import torch
from torch import nn

from ..distributed.wrappers import own_names, unwrapped
from ..errors import InputError

__all__ = ["select_trained", "tie_embeddings", "untie_embeddings"]


def select_trained(model: nn.Module, which: str = "all") -> list[str]:
    """Lets training move a part of the weights and freezes the others.

    Args:
        which: ``all``; ``attention``, the weights of diffusers' attention modules; ``cross-attention``, of those that
            look at a prompt; a pattern of whole names as ``param_groups`` takes it, such as ``*.attn2.*``; or a regular
            expression that is searched in the names, such as ``attn2|norm2``.

    Returns:
        The names of the weights that are trained, in the model's order.

    Raises:
        InputError: none is, or pattern and regular expression mean different weights; nothing was changed.
    """
    named = own_names(unwrapped(model).named_parameters())
    if which == "all":
        chosen = list(named)
    elif which in ("attention", "cross-attention"):
        chosen = list(_of_attention(model, named, which == "cross-attention"))
    else:
        chosen = _matching(named, which)
    if not chosen:
        example = next(iter(named), "none at all")
        raise InputError(f"trained weights: the model has none for {which!r}; its names are such as {example}")
    trained = set(chosen)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    return chosen


def _matching(names: Iterable[str], which: str) -> list[str]:
    """The names that a pattern fits, or in which a regular expression is found."""
    names = list(names)
    fitting, searched = [name for name in names if fnmatchcase(name, which)], []
    try:
        expression = re.compile(which)
    except (re.error, RecursionError, OverflowError) as error:
        if not fitting and not set("*?[") & set(which):
            raise InputError(
                "trained weights: expected all, attention, cross-attention, a name pattern or a regular expression, "
                f"got {which!r} ({error})"
            ) from None
    else:
        searched = [name for name in names if expression.search(name)]
    if fitting and searched and fitting != searched:
        raise InputError(
            f"trained weights: {which!r} fits {len(fitting)} names as a pattern and {len(searched)} as a regular "
            f"expression: write {_anchored(which)!r} for the pattern, or {f'({which})'!r} for the expression"
        )
    return fitting or searched


def _anchored(pattern: str) -> str:
    """The regular expression that means the same as the pattern."""
    return re.sub(r"^\(\?s:(.*)\)\\[zZ]$", r"^\1$", translate(pattern))


def _of_attention(model: nn.Module, named: dict[str, nn.Parameter], cross: bool) -> Iterator[str]:
    attention: set[nn.Parameter] = set()
    for module in unwrapped(model).modules():
        kind = getattr(module, "is_cross_attention", None)  # only diffusers' attention modules say
        if kind is not None and (kind or not cross):
            attention.update(module.parameters())
    return (name for name, parameter in named.items() if parameter in attention)


def tie_embeddings(model: nn.Module) -> int:
    """Makes all blocks of a DiT share the first one's timestep and label embedders, as in the paper's layout.

    diffusers gives every block a copy, and the copies drift apart when they are trained. Tied, they are the same
    Parameters: a gradient is the sum over the blocks. Call it before an optimizer or a mask is made, and
    :func:`untie_embeddings` before the model is saved.

    Returns:
        How many weights were saved by it. On the meta device, where copies have no numbers, they are taken to be equal.

    Raises:
        InputError: the model has no such copies, or they differ; nothing was changed.
    """
    first, *others = _embedders(model)
    shared = dict(first.named_parameters())
    for number, embedder in enumerate(others, 1):
        for name, copy in embedder.named_parameters():
            if copy is not shared[name] and not copy.is_meta and not torch.equal(copy, shared[name]):
                raise InputError(
                    f"the embedders differ: {name} of block {number} is not that of block 0; they have been trained as "
                    "copies and cannot be tied"
                )
    saved = 0
    for embedder in others:
        for name, copy in list(embedder.named_parameters()):
            if copy is not shared[name]:
                _set(embedder, name, shared[name])
                saved += copy.numel()
    return saved


def untie_embeddings(model: nn.Module) -> int:
    """Gives each block of a DiT embedders of its own again, equal to the last bit, as diffusers' files have them.

    Returns:
        How many weights were added by it.
    """
    first, *others = _embedders(model)
    shared = {id(parameter) for parameter in first.parameters()}
    added = 0
    for embedder in others:
        for name, parameter in list(embedder.named_parameters()):
            if id(parameter) in shared:
                _set(embedder, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                added += parameter.numel()
    return added


def _embedders(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(unwrapped(model), "transformer_blocks", None) or []
    embedders = [getattr(getattr(block, "norm1", None), "emb", None) for block in blocks]
    if not embedders or not all(isinstance(embedder, nn.Module) for embedder in embedders):
        raise InputError(
            f"the model, a {type(unwrapped(model)).__name__}, has no embedders in its blocks: only a "
            "DiTTransformer2DModel has"
        )
    return embedders


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path).register_parameter(leaf, parameter)
