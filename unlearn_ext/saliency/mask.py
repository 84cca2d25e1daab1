"""SaliencyMask: one bit per weight, by parameter name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..distributed.hashing import weights_hash
from ..distributed.shards import is_sharded, local, part_like
from ..distributed.wrappers import by_plain_name
from ..errors import InputError, first_line
from ..utils.arguments import check_choice, describe, is_dense
from ..utils.files import atomic_path, user_path, writable_directory
from ..utils.reading import explain_open_errors
from . import foreign, sharded
from ._parts import in_parts
from .foreign import MOST_DIMENSIONS
from .storage import StoredSums

if TYPE_CHECKING:
    from .fisher import FisherDiagonal

__all__ = ["SaliencyMask"]

_FORMAT = "unlearn_ext.saliency_mask.1"
_RESERVED = ("format", "shapes")  # keys of the header


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
        self.metadata = _as_text(metadata or {})

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
        if not scores:
            raise InputError("scores of no tensors were given: pass one tensor per parameter name")
        named, others = by_plain_name(scores.items()), by_plain_name((other or {}).items())
        for name, value in (*named.items(), *others.items()):
            if not is_dense(value) or not value.is_floating_point():
                raise InputError(f"score of {name}: expected a dense tensor of a floating dtype, got {describe(value)}")
        check_choice("score", score, ops.SCORES)
        if others.keys() != (named.keys() if score in ("product", "ratio") else set()):
            raise InputError(f"score {score!r}: expected other to have the names of scores for product and ratio only")
        for name, value in others.items():
            if value.shape != named[name].shape:
                raise InputError(
                    f"other of {name} has shape {list(value.shape)} and its score {list(named[name].shape)}: pass "
                    "tensors of equal shapes"
                )
        check_fraction("fraction", fraction)
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        bits, _ = ops.top_bits(
            [value.detach().contiguous() for value in named.values()],
            _part_of(sum(map(_numel, shapes.values())), fraction),
            other=[others[name].detach() for name in named if others],
            score=score,
        )
        words = {name: word.cpu() for name, word in zip(named, bits, strict=True)}
        return cls(words, shapes, {"mask_fraction": repr(float(fraction)), **(metadata or {})})

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
        """From Fisher sums of equal names; those that were not ``seen`` are kept out."""
        if gamma is not None and mask_fraction is not None:
            raise InputError("gamma and mask_fraction both say which weights are salient: give one of them")
        if not forget:
            raise InputError("Fisher diagonals of no tensors were given: none holds a gradient")
        names = [name for name in forget if name in seen]
        if mask_fraction is None:
            gamma = 1.0 if gamma is None else gamma
            kept = _ratio_words(forget, retain, names, gamma=gamma, **ratio)
            origin = {"gamma": repr(gamma)}
        else:
            check_fraction("mask_fraction", mask_fraction)
            # Ties are broken in logical order.
            f, r = [forget[name].contiguous() for name in names], [retain[name] for name in names]
            wanted = _part_of(sum(total.numel() for total in retain.values()), mask_fraction)
            k = min(wanted, sum(total.numel() for total in f))
            if any(map(is_sharded, f)):
                words = _on_host(ops.pack_bits(sharded.top_ratio_masks(f, r, k, **ratio)))
            else:
                bits, _ = ops.top_bits(f, k, other=r, score="ratio", **ratio)
                words = _logical(bits, f)
            kept = dict(zip(names, words, strict=True))
            origin = {"mask_fraction": repr(float(mask_fraction))}
        words = {name: kept[name] if name in kept else _no_bits(retain[name]) for name in forget}
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
        return sum(_numel(shape) for shape in self._shapes.values())

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

    __hash__ = None

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
            bits, own = self._bits.get(name), local(p)
            if bits is None:
                bits = _no_bits(own)
            elif is_sharded(p) or not own.is_contiguous():
                logical = ops.unpack_bits([bits], [torch.empty(p.shape, dtype=torch.bool, device="cpu")])[0]
                part = torch.empty_like(own, dtype=torch.bool, device="cpu").copy_(part_like(logical, p))
                bits = ops.pack_bits([part])[0]
            bound.append(bits.to(own.device))
        return bound

    def check_model(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Whether it was made for these trainable parameters, and for their values where its metadata say.

        Raises:
            InputError: it was made for other names, shapes or values.
        """
        named = list(named_parameters)
        self.bind(named)
        own = weights_hash(named) if "weights_hash" in self.metadata else None
        if self.metadata.get("weights_hash") != own:
            raise InputError(
                "the mask was made for other weights: measure a new one, or delete mask.metadata['weights_hash'] to "
                "use it all the same"
            )

    # --- Files ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: the words by name, shapes and metadata in the header."""
        from safetensors.torch import save_file

        # The user may have added to the metadata.
        header = {**_as_text(self.metadata), "format": _FORMAT, "shapes": json.dumps(self._shapes)}
        writable_directory(Path(path).parent)
        with atomic_path(path) as partial:
            save_file({name: word.contiguous() for name, word in self._bits.items()}, partial, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: no such file, or not a mask.
        """
        header, bits = _read(user_path(path))
        if header.pop("format", None) != _FORMAT:
            raise InputError(f"{path} is not a saliency mask of this package: save one with SaliencyMask.save")
        try:
            shapes = {name: _shape(sizes) for name, sizes in json.loads(header.pop("shapes")).items()}
        except (KeyError, ValueError, AttributeError, TypeError, RuntimeError, RecursionError):
            raise InputError(f"{path} is damaged: its shapes cannot be read") from None
        if shapes.keys() != bits.keys():
            raise InputError(f"{path} is damaged: it has bits and shapes of different parameters")
        shapes, bits = by_plain_name(shapes.items()), by_plain_name(bits.items())
        ordered = {name: bits[name] for name in shapes}  # safetensors sorts by size, shapes keep the model's order
        for name, word in ordered.items():
            size = _numel(shapes[name])
            fits = word.dtype == torch.int32 and word.shape == ((size + 31) // 32,)
            if not fits or (size % 32 and int(word[-1]) >> size % 32 != 0):
                raise InputError(f"{path} is damaged: the bits of {name} do not fit its shape {list(shapes[name])}")
        return cls(ordered, shapes, header)

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
        f, r = foreign.read_fisher(forget), foreign.read_fisher(retain)
        if f.keys() != r.keys():
            raise InputError(f"{forget} and {retain} hold different parameters: take two files of the same model")
        trained = {n: p for n, p in by_plain_name(named_parameters or ()).items() if p.requires_grad}
        for name in list(f):
            like = next((t for t in (f[name], r[name], trained.get(name)) if t is not None), None)
            if like is None:
                del f[name], r[name]
                continue
            for fisher in (f, r):
                if fisher[name] is None:
                    fisher[name] = torch.zeros(like.shape, dtype=torch.float32, device="cpu")
            if f[name].shape != r[name].shape:
                raise InputError(
                    f"{name} has shape {list(f[name].shape)} in {forget} and {list(r[name].shape)} in {retain}: take "
                    "two files of the same model"
                )
        seen = {name for name in f if bool(f[name].any()) or bool(r[name].any())}
        # The files hold means: no scales.
        return cls._from_ratio(f, r, seen, gamma=gamma, mask_fraction=mask_fraction, metadata=metadata, eps=eps)

    def to_pt(self, path: str | Path) -> None:
        """Writes a ``.pt`` dictionary of bool tensors for other projects: ``torch.load(path, weights_only=True)``.

        A file of :meth:`save` is 8 times smaller, and no pickle.
        """
        foreign.write_masks(self.unpack(), path)


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file of words; nothing larger than the file is made.

    Raises:
        InputError: no such file, or one that is damaged or holds other tensors.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"there is no mask at {path}")
    bits = {}
    try:
        with explain_open_errors(path), safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - not a dict
                if file.get_slice(name).get_dtype() != "I32":  # of some dtypes torch has no tensors
                    raise InputError(f"{path} is no mask: {name} is not of int32 words")
                with torch.device("cpu"):  # not on torch's default device
                    bits[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({first_line(error)})") from None
    return header, bits


def _shape(sizes: Any) -> tuple[int, ...]:
    """A shape as a tensor can have it, from what a file says; raises what torch, or Python, raises for any other."""
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise TypeError("a shape is a list of integers")
    if len(sizes) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has at most {MOST_DIMENSIONS} dimensions")
    return tuple(torch.empty(sizes, dtype=torch.bool, device="meta").shape)


def _ratio_words(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], names: list[str], **ratio: float
) -> dict[str, Tensor]:
    """Bits by name, a few tensors at a time; one by one of a forget Fisher that waits elsewhere and comes back here."""
    kept: dict[str, Tensor] = {}
    waits = isinstance(forget, StoredSums)
    for few in (slice(i, i + 1) for i in range(len(names))) if waits else in_parts([retain[name] for name in names]):
        f, r = [forget[name] for name in names[few]], [retain[name] for name in names[few]]
        if any(map(is_sharded, f)):
            words = _on_host(ops.pack_bits(sharded.ratio_masks(f, r, **ratio)))
        else:
            bits, _ = ops.ratio_bits(f, r, **ratio)
            words = _logical(bits, f)
        kept.update(zip(names[few], words, strict=True))
    return kept


def _logical(bits: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Bits on the CPU and in logical order, of those in the memory order of ``like``."""
    words = bits if all(word.device.type == "cpu" for word in bits) else _on_host(bits)
    for i, tensor in enumerate(like):
        if not tensor.is_contiguous():
            ordered = ops.unpack_bits([words[i]], [torch.empty_like(tensor, dtype=torch.bool, device="cpu")])[0]
            words[i] = ops.pack_bits([ordered.contiguous()])[0]
    return words


def _on_host(words: list[Tensor]) -> list[Tensor]:
    """In one copy: each would wait for the device."""
    return list(torch.cat(words).cpu().split([word.numel() for word in words]))


def _no_bits(like: Tensor) -> Tensor:
    return torch.zeros((like.numel() + 31) // 32, dtype=torch.int32, device="cpu")


def _as_text(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """As the header of a file holds it, beside what the file says for itself."""
    for key in _RESERVED:
        if key in metadata:
            raise InputError(f"metadata: {key!r} is what a file of a mask says for itself; choose another name")
    return {str(key): str(value) for key, value in metadata.items()}


def check_fraction(name: str, fraction: float) -> None:
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise InputError(f"{name}: expected a number from 0 to 1, got {describe(fraction)}")


def _part_of(total: int, fraction: float) -> int:
    """⌊fraction·total⌋ of the fraction that was meant: the largest k with k/total ≤ fraction in float64."""
    k = int(fraction * total)
    while k < total and (k + 1) / total <= fraction:
        k += 1
    while k > 0 and k / total > fraction:
        k -= 1
    return k


def _is_frozen(p: Tensor) -> bool:
    return isinstance(p, torch.nn.Parameter) and not p.requires_grad


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
