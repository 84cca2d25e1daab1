"""Which samples a run will use, drawn before any is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_count
from .images import ImageData

__all__ = ["Draw", "draw_indices", "draw_real", "even_shares", "until_readable"]

_Drawn = TypeVar("_Drawn")


@dataclass(frozen=True)
class Draw:
    """The batches of a run, as indices into the data: int64 [batches, batch size] each; ``replace`` as ``forget``,
    where a forgotten sample has another one that stands for it."""

    forget: Tensor
    retain: Tensor
    replace: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """Every sample that is used, each once, sorted."""
        used = [part.flatten() for part in (self.forget, self.retain, self.replace) if part is not None]
        return torch.cat(used).unique()


def draw_indices(
    labels: Tensor,
    forget_classes: Iterable[int],
    batches: int,
    batch_size: int,
    seed: int = 0,
    *,
    retain_batches: int | None = None,
    replace_classes: Iterable[int] = (),
    exclude: Iterable[int] = (),
) -> Draw:
    """Draws a run's forget and retain batches.

    Samples of each set come in random order; when all have been used, in a new one. So a set smaller than a batch
    stands in it more than once. More batches of the same seed begin with the same ones, whatever the batch size, and
    the sets are drawn independently of each other.

    Args:
        labels: int64 [N].
        forget_classes: all other classes are retained.
        batches: forget batches; retain batches too, unless ``retain_batches`` is given.
        replace_classes: retained ones, of which a sample is drawn for each forgotten one.
        exclude: samples that must not be used; the others keep their order.

    Raises:
        InputError: a class has no samples, or a set is empty.
    """
    for name, value in (("batches", batches), ("batch_size", batch_size)):
        check_count(name, value)
    if retain_batches is not None:
        check_count("retain_batches", retain_batches)
    forgotten, replacing = (
        torch.tensor(sorted(set(map(int, classes))), dtype=torch.int64, device="cpu")
        for classes in (forget_classes, replace_classes)
    )
    present = set(labels.unique().tolist())
    for index in forgotten.tolist():
        if index not in present:
            raise InputError(f"the data have no images of class {index}, which is to be forgotten")
    usable = _usable(labels, exclude)
    forget = torch.isin(labels, forgotten)
    parts = [("forget", forget, batches, 0), ("retain", ~forget, retain_batches or batches, 1)]
    if len(replacing):  # 1 << 62: a stream of its own beside those of all seeds below 2^61
        parts.append(("replacement", torch.isin(labels, replacing) & ~forget, batches, 1 << 62))
    sets = []
    for name, members, count, salt in parts:
        if not bool((members & usable).any()):
            if bool(members.any()):
                reason = f"none of {int(members.sum())} samples can be read"
            else:
                reason = "every class is to be forgotten" if name == "retain" else "no samples"
            raise InputError(f"the {name} set is empty ({reason}): name other classes, or give more data")
        generator = torch.Generator().manual_seed((2 * int(seed) + salt) % (1 << 63))
        sets.append(_stream(members.nonzero().flatten(), usable, count * batch_size, generator).view(count, batch_size))
    return Draw(*sets)


def _stream(members: Tensor, usable: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn, parts = 0, []
    while drawn < count:
        parts.append(_order(members, usable, generator))
        drawn += len(parts[-1])
    return torch.cat(parts)[:count]


def even_shares(counts: Sequence[int], most: int) -> list[int]:
    """How many of each, at most ``most`` in all and as equal as ``counts`` allow: the largest give way first."""
    shares, left = [0] * len(counts), most
    for position, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[i] = min(counts[i], left // (len(counts) - position))
        left -= shares[i]
    return shares


def draw_real(
    labels: Tensor, classes: Iterable[Sequence[int]], seed: int, *, most: int, exclude: Iterable[int] = ()
) -> Tensor:
    """Indices of the real images that stand for these classes: all, or an even draw of ``most``; int64 [N], sorted.

    Args:
        labels: int64, of the whole data.
        classes: each as the labels that belong to it: of a text model, all that share its prompt.
        exclude: samples that cannot be used; others take their place.
    """
    usable, generator = _usable(labels, exclude), torch.Generator().manual_seed(seed)
    members = (
        torch.isin(labels, torch.tensor(group, dtype=torch.int64, device="cpu")).nonzero().flatten()
        for group in classes
    )
    orders = [_order(indices, usable, generator) for indices in members]
    shares = even_shares([len(order) for order in orders], most)
    return torch.cat([order[:share] for order, share in zip(orders, shares, strict=True)]).sort().values


def until_readable(data: ImageData, draw: Callable[[set[int]], _Drawn], read: Callable[[_Drawn], Any]) -> _Drawn:
    """What ``draw`` draws, once all of it can be read: others take the place of unreadable samples.

    Args:
        draw: is given the samples that must not be drawn.
        read: decodes what was drawn, and adds what it cannot decode to ``data.unreadable``, as ``data.verify`` does.
    """
    while True:
        known = set(data.unreadable)
        try:
            drawn = draw(known)
        except InputError as error:
            if not known:
                raise
            raise InputError(f"{error}; the first that cannot be read is {data.unreadable[min(known)]}") from None
        read(drawn)
        if set(data.unreadable) == known:
            return drawn


def _usable(labels: Tensor, exclude: Iterable[int]) -> Tensor:
    usable = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    usable[torch.tensor(sorted(set(map(int, exclude))), dtype=torch.int64, device="cpu")] = False
    return usable


def _order(members: Tensor, usable: Tensor, generator: torch.Generator) -> Tensor:
    """Random, and the same whatever is excluded."""
    order = members[torch.randperm(len(members), generator=generator, device="cpu")]
    return order[usable[order]]
