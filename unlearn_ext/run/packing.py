"""Takes values that neither JSON nor safetensors hold apart into JSON and plain tensors, and puts them together again.

Without pickles. Bit for bit: sparse, complex, quantised and sub-byte tensors, NumPy arrays, and Python's containers.
"""

from __future__ import annotations

import collections
import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.shards import is_sharded
from ..errors import InputError

__all__ = ["Packer", "copy_of", "is_plain", "put", "unpack"]

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_FLOATS += ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_PLAIN = {getattr(torch, name) for name in _FLOATS + _INTEGERS if hasattr(torch, name)}
_COMPRESSED = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices),
}
_QUANTISED = {torch.quint8, torch.qint8, torch.qint32}
_SEQUENCES = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_MAPPINGS = {dict: "dict", collections.OrderedDict: "ordered dict"}


def is_plain(tensor: Tensor) -> bool:
    """Whether safetensors hold it as it is."""
    if is_sharded(tensor):
        return True
    odd = tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return not odd and not _is_made_of_others(tensor) and tensor.dtype in _PLAIN


def _is_made_of_others(tensor: Tensor) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__") and not is_sharded(tensor)


class Packer:
    """Collects in ``tensors`` what the JSON of :meth:`pack` refers to."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def pack(self, value: Any, what: str) -> Any:
        """JSON for a value.

        Raises:
            InputError: it has no such form; ``what`` names it.
        """
        try:
            return self._pack(value, what)
        except RecursionError:
            raise InputError(f"{what} is nested too deeply for a checkpoint") from None

    def _pack(self, value: Any, what: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str, float) or (kind is int and abs(value) < 2**63):
            return value
        if kind is int:
            return {"is": "int", "hex": hex(value)}
        if kind is complex:
            return {"is": "complex", "parts": [value.real, value.imag]}
        if kind in _SEQUENCES:
            return {"is": _SEQUENCES[kind], "items": [self._pack(item, what) for item in value]}
        if kind in _MAPPINGS:
            items = [[self._pack(key, what), self._pack(item, what)] for key, item in value.items()]
            return {"is": _MAPPINGS[kind], "items": items}
        if kind in (bytes, bytearray, io.BytesIO):
            content = value.getvalue() if kind is io.BytesIO else value
            return {"is": kind.__name__, "bytes": self._keep(_as_bytes(content))}
        if kind in (torch.dtype, torch.device):
            return {"is": kind.__name__, "name": str(value).removeprefix("torch.")}
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcSU":
            content = self._keep(_as_bytes(np.ascontiguousarray(value).tobytes()))
            name = "array" if isinstance(value, np.ndarray) else "scalar"
            return {"is": name, "dtype": value.dtype.str, "shape": list(value.shape), "bytes": content}
        if isinstance(value, Tensor) and not is_sharded(value):
            return self._pack_tensor(value.detach(), what)
        raise InputError(
            f"{what} is or holds a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: make it of "
            "numbers, texts, lists, dicts and tensors, or leave checkpointing_steps out"
        )

    def _pack_tensor(self, tensor: Tensor, what: str) -> dict[str, Any]:
        place, size = {"device": str(tensor.device)}, list(tensor.shape) if not tensor.is_nested else []
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta or tensor.is_nested or _is_made_of_others(tensor):
            pass
        elif tensor.layout == torch.sparse_coo:
            parts = [self._pack_tensor(part, what) for part in (tensor._indices(), tensor._values())]
            return {"is": "coo", "dtype": dtype, "size": size, "parts": parts, "coalesced": tensor.is_coalesced()}
        elif tensor.layout in _COMPRESSED:
            outer, inner = _COMPRESSED[tensor.layout]
            parts = [self._pack_tensor(part, what) for part in (outer(tensor), inner(tensor), tensor.values())]
            layout = str(tensor.layout).removeprefix("torch.")
            return {"is": "compressed", "dtype": dtype, "size": size, "parts": parts, "layout": layout}
        elif tensor.is_quantized:
            if tensor.dtype in _QUANTISED and tensor.qscheme() == torch.per_tensor_affine:
                numbers = {"scale": tensor.q_scale(), "zero": tensor.q_zero_point()}
                value = self._pack_tensor(tensor.int_repr(), what)
                return {"is": "quantised", "dtype": dtype, "size": size, "parts": [value], **numbers}
            if tensor.dtype in _QUANTISED and tensor.qscheme() == torch.per_channel_affine:
                parts = (tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
                parts = [self._pack_tensor(part, what) for part in parts]
                axis = tensor.q_per_channel_axis()
                return {"is": "quantised by channel", "dtype": dtype, "size": size, "parts": parts, "axis": axis}
        elif tensor.layout == torch.strided:
            plain = self._as_plain(tensor)
            if plain is not None:
                return {"is": "tensor", "dtype": dtype, "size": size, "value": self._keep(plain), **place}
        raise InputError(
            f"{what} is {_described(tensor)}, which a checkpoint cannot hold: make it a dense tensor of an ordinary "
            "dtype, register it with persistent=False, or leave checkpointing_steps out"
        )

    def _as_plain(self, tensor: Tensor) -> Tensor | None:
        tensor = tensor.resolve_conj().resolve_neg()
        if tensor.dtype in _PLAIN:
            return tensor
        if tensor.is_complex():
            return torch.view_as_real(tensor)
        if tensor.is_contiguous():
            with contextlib.suppress(RuntimeError):
                return tensor.view(torch.uint8)
        return None

    def _keep(self, tensor: Tensor) -> str:
        key = str(len(self.tensors))
        self.tensors[key] = tensor
        return key


def _as_bytes(content: bytes | bytearray) -> Tensor:
    if not content:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _described(tensor: Tensor) -> str:
    for what, holds in (
        ("a nested tensor", tensor.is_nested),
        ("a tensor on the meta device", tensor.is_meta),
        (f"a {type(tensor).__name__}", _is_made_of_others(tensor)),
    ):
        if holds:
            return what
    return f"a tensor of {tensor.dtype} and layout {tensor.layout}".replace("torch.", "")


def unpack(document: Any, tensors: Callable[[str], Tensor]) -> Any:
    """What :meth:`Packer.pack` was given; ``tensors`` gives those that it has kept."""
    if not isinstance(document, dict):
        return document
    kind = document["is"]
    for types in (_SEQUENCES, _MAPPINGS):
        for make, name in types.items():
            if name == kind:
                items = (unpack(item, tensors) if types is _SEQUENCES else _pair(item, tensors) for item in
                         document["items"])  # fmt: skip
                return make(items)
    if kind == "int":
        return int(document["hex"], 16)
    if kind == "complex":
        return complex(*document["parts"])
    if kind in ("bytes", "bytearray", "BytesIO"):
        return {"bytes": bytes, "bytearray": bytearray, "BytesIO": io.BytesIO}[kind](_content(document, tensors))
    if kind == "dtype":
        return getattr(torch, document["name"])
    if kind == "device":
        return torch.device(document["name"])
    if kind in ("array", "scalar"):
        array = np.frombuffer(bytearray(_content(document, tensors)), dtype=np.dtype(document["dtype"]))
        array = array.reshape(document["shape"])
        return array if kind == "array" else array[()]
    return _unpack_tensor(document, tensors)


def _pair(item: list[Any], tensors: Callable[[str], Tensor]) -> tuple[Any, Any]:
    return unpack(item[0], tensors), unpack(item[1], tensors)


def _content(document: dict[str, Any], tensors: Callable[[str], Tensor]) -> bytes:
    return tensors(document["bytes"]).cpu().numpy().tobytes()


def _unpack_tensor(document: dict[str, Any], tensors: Callable[[str], Tensor]) -> Tensor:
    kind, dtype, size = document["is"], getattr(torch, document["dtype"]), document["size"]
    if kind == "tensor":
        value = tensors(document["value"]).clone()
        with contextlib.suppress(RuntimeError):  # the device may not be there any more
            value = value.to(document["device"])
        if value.dtype == dtype:
            return value
        return torch.view_as_complex(value) if dtype.is_complex else value.view(dtype)
    parts = [_unpack_tensor(part, tensors) for part in document["parts"]]
    if kind == "coo":
        return torch.sparse_coo_tensor(*parts, size, is_coalesced=document["coalesced"])
    if kind == "compressed":
        with warnings.catch_warnings():  # that sparse CSR is in beta
            warnings.simplefilter("ignore")
            return torch.sparse_compressed_tensor(*parts, size, layout=getattr(torch, document["layout"]))
    if kind == "quantised":
        return torch._make_per_tensor_quantized_tensor(parts[0], document["scale"], document["zero"])
    return torch._make_per_channel_quantized_tensor(*parts, document["axis"])


def copy_of(tensor: Tensor) -> Tensor:
    """A copy of its bits, of whatever kind it is."""
    try:
        return tensor.clone()
    except RuntimeError:  # dtypes that can be looked at and nothing else
        return tensor.view(torch.uint8).clone().view(tensor.dtype)


def put(target: Tensor, value: Tensor) -> None:
    """Gives a tensor the contents of another of its kind; whoever holds it sees them."""
    value = value.to(target.device)
    if is_plain(target) or (target.is_complex() and target.layout == torch.strided):
        once = tuple(slice(1) if stride == 0 else slice(None) for stride in target.stride())
        target[once].copy_(value[once])  # torch writes to no expanded tensor, which repeats what it holds once
    elif target.layout in _COMPRESSED:
        target.resize_as_sparse_(value).copy_(value)
    else:
        target.data = value
