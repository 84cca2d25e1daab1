"""SaliencyMask: one bit per weight, by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..distributed.hashing import weights_hash
from ..distributed.shards import is_sharded, local, part_like
from ..distributed.wrappers import by_plain_name
from ..errors import InputError
from ..utils.arguments import describe, is_dense
from . import foreign
from .files import as_text, numel, read_mask, write_mask
from .selection import bits_by_ratio, bits_by_score, no_bits

if TYPE_CHECKING:
    from .fisher import FisherDiagonal

__all__ = ["SaliencyMask"]


class SaliencyMask:
    """Which weights may be moved to forget, as packed bits by parameter name.

    Bits stand in logical (C) order here and in files; :meth:`bind` brings them into a model's memory order. Names
    carry no wrapper's prefix: ``_orig_mod.`` nowhere, ``module.`` not on every one.

    Args:
        bits: name -> int32 words of ⌈n/32⌉, tail bits zero.
        shapes: name -> shape of the parameter.
        metadata: what says where the mask comes from, kept as strings: ``weights_hash``, ``forget_hash``, ``seed``,
            ``gamma`` or ``mask_fraction``. ``format`` and ``shapes`` are the file's own.
    """

    def __init__(
        self,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._bits = dict(bits)
        self._shapes = {name: tuple(shapes[name]) for name in bits}
        self.metadata = as_text(metadata or {})

    @classmethod
    def from_dict(cls, masks: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> SaliencyMask:
        """From bool tensors by parameter name, each of its parameter's shape; True may be moved."""
        if not masks:
            raise InputError("a mask of no tensors was given: pass one bool tensor per parameter name")
        named = by_plain_name(masks.items())
        for name, mask in named.items():
            if not is_dense(mask) or mask.dtype != torch.bool:
                raise InputError(
                    f"mask of {name}: expected a dense torch.bool tensor, got {describe(mask)}; convert it with != 0"
                )
        flat = [mask.detach().cpu().contiguous() for mask in named.values()]
        bits = dict(zip(named, ops.pack_bits(flat), strict=True))
        return cls(bits, {name: tuple(mask.shape) for name, mask in named.items()}, metadata)

    @classmethod
    def top_fraction(
        cls,
        scores: Mapping[str, Tensor],
        fraction: float,
        metadata: Mapping[str, str] | None = None,
        *,
        score: str = "value",
        other: Mapping[str, Tensor] | None = None,
    ) -> SaliencyMask:
        """The weights of the largest scores: exactly ⌊fraction·N⌋ of N over all tensors together.

        Equal scores are kept in the order of the names given, then in logical order; NaN ranks last. ⌊fraction·N⌋ is
        the largest k whose quotient k/N, rounded to float64, does not exceed ``fraction``: 0.29 of 100 weights are 29,
        although the float called 0.29 is less than 29/100.

        Args:
            scores: one floating tensor for each parameter, of its shape; for SalUn the summed gradients.
            fraction: from 0 to 1.
            score: how a weight's number is ranked: ``value``, ``magnitude``, ``product`` or ``ratio``, as in
                :func:`~unlearn_ext.ops.top_bits`; ``magnitude`` for gradients.
            other: the second number of each weight, for ``product`` and ``ratio``.
        """
        bits, shapes = bits_by_score(scores, fraction, score, other)
        return cls(bits, shapes, {"mask_fraction": repr(float(fraction)), **(metadata or {})})

    @classmethod
    def from_fisher(
        cls,
        forget: FisherDiagonal,
        retain: FisherDiagonal,
        *,
        gamma: float | None = None,
        mask_fraction: float | None = None,
        eps: float = 1e-15,
        metadata: Mapping[str, str] | None = None,
    ) -> SaliencyMask:
        """SFR-on's mask: keep = (F_f + eps) / (F_r + eps) ≥ gamma, F being means over batches (or samples).

        A parameter that received no gradient in either pass is kept out. Source: arXiv 2409.19732.

        Args:
            gamma: the ratio a weight must reach; 1 unless ``mask_fraction`` is given.
            mask_fraction: instead of gamma: keep the weights of the largest ratios, ⌊mask_fraction·N⌋ of all N, as
                :meth:`top_fraction` counts and breaks ties; fewer where fewer than that received a gradient.
            eps: keeps the ratio finite.
        """
        if list(forget.sums) != list(retain.sums):
            raise InputError("the two Fisher diagonals are of different parameters: measure both on the same model")
        if not forget.count or not retain.count:
            raise InputError("a Fisher diagonal has seen no data: call measure() on both first")
        return cls._from_ratio(
            forget.sums,
            retain.sums,
            forget.seen | retain.seen,
            gamma=gamma,
            mask_fraction=mask_fraction,
            metadata=metadata,
            eps=eps,
            forget_scale=1.0 / forget.count,
            retain_scale=1.0 / retain.count,
        )

    @classmethod
    def _from_ratio(
        cls,
        forget: Mapping[str, Tensor],
        retain: Mapping[str, Tensor],
        seen: Set[str],
        *,
        gamma: float | None,
        mask_fraction: float | None,
        metadata: Mapping[str, str] | None,
        **ratio: float,
    ) -> SaliencyMask:
        words, origin = bits_by_ratio(forget, retain, seen, gamma=gamma, mask_fraction=mask_fraction, **ratio)
        shapes = {name: tuple(retain[name].shape) for name in forget}
        return cls(by_plain_name(words.items()), by_plain_name(shapes.items()), {**origin, **(metadata or {})})

    # --- What it holds --------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._bits)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def unpack(self) -> dict[str, Tensor]:
        """Contiguous bool tensors on the CPU, each of its parameter's shape."""
        like = [torch.empty(shape, dtype=torch.bool, device="cpu") for shape in self._shapes.values()]
        return dict(zip(self._bits, ops.unpack_bits(list(self._bits.values()), like), strict=True))

    @property
    def kept(self) -> int:
        """Weights that may be moved."""
        return int(ops.count_bits(list(self._bits.values())).sum())

    @property
    def total(self) -> int:
        return sum(numel(shape) for shape in self._shapes.values())

    @property
    def density(self) -> float:
        """The kept fraction over all tensors."""
        return self.kept / self.total if self.total else 0.0

    def __repr__(self) -> str:
        return f"SaliencyMask({len(self._bits)} tensors, {self.kept:,} of {self.total:,} weights kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SaliencyMask):
            return NotImplemented
        same_shapes = self._shapes == other._shapes
        return same_shapes and all(torch.equal(word, other._bits[name]) for name, word in self._bits.items())

    __hash__ = None  # type: ignore[assignment]  # as Python does for a class with __eq__

    # --- To a model -----------------------------------------------------------------------------------------

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Bits for these parameters, in their order, memory order and device.

        A frozen parameter (``requires_grad=False``) needs none in the mask: it gets zeros. Of a parameter that is
        sharded over several ranks each gets the bits of its own part.

        Raises:
            InputError: a name is missing or unknown, or a shape differs.
        """
        named = by_plain_name(named_parameters)
        without = [name for name in named if name not in self._bits]
        for problem, names in (
            ("has no bits for", [name for name in without if not _is_frozen(named[name])]),
            ("has bits for, and the model does not train,", [name for name in self._bits if name not in named]),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"the mask {problem} {names[0]}{more}: use the mask made for this model")
        for name, p in named.items():
            if name in self._bits and tuple(p.shape) != self._shapes[name]:
                raise InputError(
                    f"the mask of {name} has shape {list(self._shapes[name])} and the parameter {list(p.shape)}: use "
                    "the mask made for this model"
                )
        bound = []
        for name, p in named.items():
            bits, part = self._bits.get(name), local(p)
            if bits is None:
                bits = no_bits(part)
            elif is_sharded(p) or not part.is_contiguous():
                logical = ops.unpack_bits([bits], [torch.empty(p.shape, dtype=torch.bool, device="cpu")])[0]
                keep = torch.empty_like(part, dtype=torch.bool, device="cpu").copy_(part_like(logical, p))
                bits = ops.pack_bits([keep])[0]
            bound.append(bits.to(part.device))
        return bound

    def check_model(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Whether it was made for these trainable parameters, and for their values where its metadata say.

        Raises:
            InputError: it was made for other names, shapes or values.
        """
        named = list(named_parameters)
        self.bind(named)
        current = weights_hash(named) if "weights_hash" in self.metadata else None
        if self.metadata.get("weights_hash") != current:
            raise InputError(
                "the mask was made for other weights: measure a new one, or delete mask.metadata['weights_hash'] to "
                "use it all the same"
            )

    # --- Files ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: the words by name, shapes and metadata in the header."""
        write_mask(path, self._bits, self._shapes, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: no such file, or not a mask.
        """
        return cls(*read_mask(path))

    # --- Files of other projects ----------------------------------------------------------------------------

    @classmethod
    def from_pt(
        cls,
        path: str | Path,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SaliencyMask:
        """Reads the mask that SalUn (0 and 1 as int64) or SFR-on (bool) saved: a ``.pt`` dictionary by parameter name.

        Only tensors are read (``weights_only=True``); no code in the file is run.

        Args:
            named_parameters: of the model. SFR-on writes the number 0 for a parameter without a gradient; it becomes
                zeros of the shape found here, and is left out if it is not found, as frozen ones should be.

        Raises:
            InputError: no such file, no dictionary of tensors, or other values than 0 and 1.
        """
        named = by_plain_name(named_parameters or ())
        shapes = {name: tuple(p.shape) for name, p in named.items() if p.requires_grad}
        return cls.from_dict(foreign.read_masks(path, shapes), metadata)

    @classmethod
    def from_fisher_pt(
        cls,
        forget: str | Path,
        retain: str | Path,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        gamma: float | None = None,
        mask_fraction: float | None = None,
        eps: float = 1e-15,
        metadata: Mapping[str, str] | None = None,
    ) -> SaliencyMask:
        """From the two Fisher files that SFR-on saved; gamma, mask_fraction and eps are those of :meth:`from_fisher`.

        A parameter that received no gradient has zeros or the number 0 in both files; it is kept out.

        Args:
            named_parameters: of the model, as in :meth:`from_pt`.
        """
        f, r = foreign.read_fishers(forget, retain, by_plain_name(named_parameters or ()))
        seen = {name for name in f if bool(f[name].any()) or bool(r[name].any())}
        # The files hold means: no scales.
        return cls._from_ratio(f, r, seen, gamma=gamma, mask_fraction=mask_fraction, metadata=metadata, eps=eps)

    def to_pt(self, path: str | Path) -> None:
        """Writes a ``.pt`` dictionary of bool tensors for other projects: ``torch.load(path, weights_only=True)``.

        A file of :meth:`save` is 8 times smaller, and no pickle.
        """
        foreign.write_masks(self.unpack(), path)


def _is_frozen(p: Tensor) -> bool:
    return isinstance(p, torch.nn.Parameter) and not p.requires_grad
