"""SaliencyMask: one bit per weight, by parameter name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .._files import atomic_path, writable_directory
from .._names import by_plain_name
from ..errors import InputError

if TYPE_CHECKING:
    from .fisher import FisherDiagonal

__all__ = ["SaliencyMask"]

_FORMAT = "unlearn_ext.saliency_mask.1"


class SaliencyMask:
    """Which weights may be moved to forget, as packed bits by parameter name.

    Bits stand in logical (C) order here and in files; :meth:`bind` brings them into a model's memory order. Names
    carry no wrapper's prefix: ``_orig_mod.`` nowhere, ``module.`` not on every one.

    Args:
        bits: name -> int32 words of ⌈n/32⌉, tail bits zero.
        shapes: name -> shape of the parameter.
        metadata: strings that say where the mask comes from: ``weights_hash``, ``forget_hash``, ``seed``, ``gamma``.
    """

    def __init__(
        self,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._bits = dict(bits)
        self._shapes = {name: tuple(shapes[name]) for name in bits}
        self.metadata = dict(metadata or {})

    @classmethod
    def from_dict(cls, masks: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> SaliencyMask:
        """From bool tensors by parameter name, each of its parameter's shape; True may be moved."""
        if not masks:
            raise InputError("a mask of no tensors was given: pass one bool tensor per parameter name")
        named = by_plain_name(masks.items())
        for name, mask in named.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"mask of {name}: expected a torch.bool tensor, got {got}; convert it with != 0")
        flat = [mask.detach().cpu().contiguous() for mask in named.values()]
        bits = dict(zip(named, ops.pack_bits(flat), strict=True))
        return cls(bits, {name: tuple(mask.shape) for name, mask in named.items()}, metadata)

    @classmethod
    def from_fisher(
        cls,
        forget: FisherDiagonal,
        retain: FisherDiagonal,
        *,
        gamma: float = 1.0,
        eps: float = 1e-15,
        metadata: Mapping[str, str] | None = None,
    ) -> SaliencyMask:
        """SFR-on's mask: keep = (F_f + eps) / (F_r + eps) ≥ gamma, F being means over batches (or samples).

        A parameter that received no gradient in either pass is kept out. Source: arXiv 2409.19732.
        """
        names = list(forget.sums)
        if names != list(retain.sums):
            raise InputError("the two Fisher diagonals are of different parameters: measure both on the same model")
        if not forget.count or not retain.count:
            raise InputError("a Fisher diagonal has seen no data: call measure() on both first")
        bits, _ = ops.ratio_bits(
            list(forget.sums.values()),
            list(retain.sums.values()),
            gamma=gamma,
            eps=eps,
            forget_scale=1.0 / forget.count,
            retain_scale=1.0 / retain.count,
        )
        seen = forget.seen | retain.seen
        bits = [word if name in seen else torch.zeros_like(word) for name, word in zip(names, bits, strict=True)]
        masks = ops.unpack_bits(bits, list(forget.sums.values()))
        return cls.from_dict(dict(zip(names, masks, strict=True)), {"gamma": repr(gamma), **(metadata or {})})

    # --- What it holds --------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._bits)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def unpack(self) -> dict[str, Tensor]:
        """Contiguous bool tensors on the CPU, each of its parameter's shape."""
        like = [torch.empty(shape, dtype=torch.bool) for shape in self._shapes.values()]
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

    @property
    def densities(self) -> dict[str, float]:
        """The kept fraction of each tensor; 0 for an empty one."""
        counts = ops.count_bits(list(self._bits.values())).tolist()
        sizes = map(_numel, self._shapes.values())
        return {name: k / n if n else 0.0 for name, k, n in zip(self._bits, counts, sizes, strict=True)}

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

        Raises:
            InputError: a name is missing or unknown, or a shape differs.
        """
        named = by_plain_name(named_parameters)
        for problem, names in (
            ("has no bits for", [name for name in named if name not in self._bits]),
            ("has bits for, and the model does not train,", [name for name in self._bits if name not in named]),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"the mask {problem} {names[0]}{more}: use the mask made for this model")
        for name, p in named.items():
            if tuple(p.shape) != self._shapes[name]:
                raise InputError(
                    f"the mask of {name} has shape {list(self._shapes[name])} and the parameter {list(p.shape)}: use "
                    "the mask made for this model"
                )
        bound = []
        for name, p in named.items():
            bits = self._bits[name]
            if not p.is_contiguous():
                logical = ops.unpack_bits([bits], [torch.empty(p.shape, dtype=torch.bool)])[0]
                bits = ops.pack_bits([torch.empty_like(p, dtype=torch.bool, device="cpu").copy_(logical)])[0]
            bound.append(bits.to(p.device))
        return bound

    # --- Files ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: the words by name, shapes and metadata in the header."""
        from safetensors.torch import save_file

        header = {**self.metadata, "format": _FORMAT, "shapes": json.dumps(self._shapes)}
        writable_directory(Path(path).parent)
        with atomic_path(path) as partial:
            save_file({name: word.contiguous() for name, word in self._bits.items()}, partial, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: no such file, or not a mask.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"there is no mask at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file ({error})") from None
        if header.pop("format", None) != _FORMAT:
            raise InputError(f"{path} is not a saliency mask of this package: save one with SaliencyMask.save")
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(header.pop("shapes")).items()}
        except (KeyError, ValueError, AttributeError, TypeError):
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


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
