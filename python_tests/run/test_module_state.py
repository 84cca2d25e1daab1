"""Buffers that safetensors cannot hold, and get_extra_state: restored bit for bit, or refused before the first step."""

from __future__ import annotations

import collections
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import ConvNet, make
from helpers.runs import identical, run, weights
from torch import Tensor, nn

from unlearn_ext import InputError
from unlearn_ext.run.module_state import check_storable, pack_module, unpack_module
from unlearn_ext.run.packing import Packer, unpack


def quantised(make_it, *arguments: object) -> Tensor:
    with warnings.catch_warnings():  # they are deprecated, and still in models
        warnings.simplefilter("ignore")
        return make_it(*arguments)


def by_channel() -> Tensor:
    scales, zeros = torch.tensor([0.1, 0.3], dtype=torch.float64), torch.tensor([3, -2])
    return torch.quantize_per_channel(torch.randn(4, 2), scales, zeros, 1, torch.qint8)


def sparse(*shape: int) -> Tensor:
    """Other numbers, and as a rule another number of them, at each call."""
    return torch.randn(*shape) * (torch.rand(*shape) < 0.5) + torch.eye(*shape) * 1e-40


def bytes_of_noise() -> Tensor:
    return torch.randint(0, 256, (6,), dtype=torch.uint8)


BUFFERS = {
    "coo": lambda: sparse(5, 6).to_sparse(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor([[1, 1, 0]], torch.randn(3).log(), (3,), is_coalesced=False),
    "coo, dense rows, complex": lambda: torch.sparse_coo_tensor(
        [[2]], torch.randn(1, 2, dtype=torch.complex128), (3, 2)
    ),
    "coo, empty": lambda: torch.zeros(2, 3).to_sparse(),
    "csr": lambda: sparse(5, 6).to_sparse_csr(),
    "csc": lambda: sparse(5, 6).to_sparse_csc(),
    "bsr": lambda: sparse(6, 6).to_sparse_bsr((2, 2)),
    "bsc": lambda: sparse(6, 6).to_sparse_bsc((2, 1)),
    "complex64": lambda: torch.randn(2, 3, dtype=torch.complex64),
    "complex128": lambda: torch.randn(2, 3, dtype=torch.complex128).t(),
    "complex, conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "complex32": lambda: torch.view_as_complex(torch.randn(3, 2).half()),
    "complex, none": lambda: torch.zeros(0, 2, dtype=torch.complex128),
    "quint8": lambda: quantised(torch.quantize_per_tensor, torch.randn(5), 0.1, 3, torch.quint8),
    "qint32": lambda: quantised(torch.quantize_per_tensor, torch.randn(5), 0.37, -3, torch.qint32),
    "by channel": lambda: quantised(by_channel),
    "uint4": lambda: bytes_of_noise().view(torch.uint4),
    "bits8": lambda: bytes_of_noise().view(torch.bits8),
    "float4": lambda: bytes_of_noise().view(torch.float4_e2m1fn_x2),
    "no elements": lambda: torch.zeros(0, 3),
    "a number": lambda: torch.randn(()),
}


def pieces(value: Tensor) -> list:
    """All that a tensor is made of, as plain tensors and numbers: an oracle that takes them from torch itself."""
    made = [value.shape, value.dtype, value.layout]
    if value.layout == torch.sparse_coo:
        return [*made, value.is_coalesced(), *pieces(value._indices()), *pieces(value._values())]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [*made, *pieces(value.crow_indices()), *pieces(value.col_indices()), *pieces(value.values())]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [*made, *pieces(value.ccol_indices()), *pieces(value.row_indices()), *pieces(value.values())]
    if value.is_quantized and value.qscheme() == torch.per_tensor_affine:
        return [*made, value.q_scale(), value.q_zero_point(), value.int_repr().tolist()]
    if value.is_quantized:
        numbers = (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        return [*made, value.q_per_channel_axis(), *(n.tolist() for n in numbers), value.int_repr().tolist()]
    flat = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return [
        *made,
        flat.contiguous().view(torch.uint8).tolist() if flat.dim() else flat[None].view(torch.uint8).tolist(),
    ]


class Holding(ConvNet):
    """A model with a buffer beside its weights."""

    def __init__(self, buffer: Tensor):
        super().__init__()
        self.register_buffer("table", buffer)


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    buffer = BUFFERS[name]()
    model = make(Holding, buffer=buffer)
    run(model, output_dir=tmp_path, checkpointing_steps=6)
    assert pieces(model.table) == pieces(buffer)
    torch.manual_seed(2)
    other = BUFFERS[name]()
    resumed = make(Holding, seed=4, buffer=other)
    run(resumed, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-6")
    assert resumed.table is other  # whoever else holds it sees it
    assert pieces(resumed.table) == pieces(buffer)
    del model.table, resumed.table
    assert identical(weights(model), weights(resumed))
    for file in (tmp_path / "checkpoint-6").iterdir():
        assert file.suffix in (".safetensors", ".json", ".jsonl", "")


def test_an_expanded_buffer(tmp_path: Path) -> None:
    """As ``arange(n).expand(2, -1)``: torch writes to none of these as they are."""
    run(make(Holding, buffer=torch.tensor([[1.5, 2.5]]).expand(3, 2)), output_dir=tmp_path, checkpointing_steps=6)
    resumed = make(Holding, seed=4, buffer=torch.zeros(1, 2).expand(3, 2))
    run(resumed, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-6")
    assert torch.equal(resumed.table, torch.tensor([[1.5, 2.5]] * 3))


def test_a_sparse_buffer_with_more_entries_than_the_model_has(tmp_path: Path) -> None:
    run(make(Holding, buffer=torch.ones(3, 3).to_sparse_csr()), output_dir=tmp_path, checkpointing_steps=6)
    resumed = make(Holding, buffer=torch.eye(3).to_sparse_csr())
    run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert torch.equal(resumed.table.to_dense(), torch.ones(3, 3))
    with pytest.raises(InputError, match="holds another model: table is missing or has another shape or dtype"):
        run(make(Holding, buffer=torch.eye(3)), output_dir=tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "buffer, what",
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested tensor"),
        (lambda: torch.ones(4, 4).to_mkldnn(), "a tensor of float32 and layout _mkldnn"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_restored_is_refused_by_name_before_the_first_step(buffer, what: str, tmp_path: Path) -> None:
    model = make()
    model.norm.register_buffer("table", buffer())
    before = model.conv.weight.detach().clone()
    with pytest.raises(InputError, match=rf"^norm\.table of the model is {what}, which a checkpoint cannot hold: "):
        run(model, output_dir=tmp_path, checkpointing_steps=6)
    assert torch.equal(before, model.conv.weight) and not list(tmp_path.iterdir())


# --- get_extra_state ------------------------------------------------------------------------------------------


class Warming(nn.Linear):
    """Its output depends on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (1 + 0.1 * self.calls)

    def get_extra_state(self):
        return {"calls": self.calls, ("a", 1): torch.tensor([math.nan])}

    def set_extra_state(self, state) -> None:
        assert state["a", 1].isnan().all()
        self.calls = state["calls"]


class Warm(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = Warming(6, 4)


class Cold(nn.Linear):
    def get_extra_state(self):
        return {}


class Strange(nn.Linear):
    state: object = object()

    def get_extra_state(self):
        return {"inner": [self.state]}

    def set_extra_state(self, state) -> None:
        pass


@pytest.mark.parametrize("method", [{}, {"teacher": True}])
def test_a_run_with_extra_state_goes_on_as_it_was(method: dict, tmp_path: Path) -> None:
    from helpers.models import batches

    from unlearn_ext import Unlearner
    from unlearn_ext.methods import parse
    from unlearn_ext.tasks import Classification

    def run_it(model: nn.Module, **arguments):
        chosen = "scrub:epochs=3,lr=0.05" if method else "finetune:iterations=12,lr=0.05"
        data = {"retain": batches(5, 6, seed=2), **({"forget": batches(3, 6, seed=1)} if method else {})}
        return Unlearner(model, Classification(), parse(chosen)).run(**data, **arguments)

    whole, resumed = make(Warm), make(Warm, seed=4)
    expected = run_it(whole, output_dir=tmp_path, checkpointing_steps=5)
    result = run_it(resumed, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-5")
    assert resumed.head.calls == whole.head.calls > 0
    own = [name for name in whole.state_dict() if "extra" not in name]
    assert all(torch.equal(whole.state_dict()[name], resumed.state_dict()[name]) for name in own)
    assert result.history == expected.history


def test_extra_state_that_has_no_form_without_pickle_is_refused(tmp_path: Path) -> None:
    model = make()
    model.head = Strange(6, 4)
    before = model.head.weight.detach().clone()
    words = r"^what get_extra_state of head returns is or holds a builtins\.object, which a checkpoint cannot hold"
    with pytest.raises(InputError, match=words):
        run(model, output_dir=tmp_path, checkpointing_steps=6)
    assert torch.equal(before, model.head.weight)
    assert len(run(model).history) == 12  # without checkpoints it runs
    model.head = Cold(6, 4)
    with pytest.raises(InputError, match=r"head \(a Cold\) has get_extra_state and no set_extra_state"):
        check_storable(model)


VALUES = {
    "nothing": None,
    "numbers": [True, False, 0, -1, 2**70, -(2**70), 1.5, -0.0, math.inf, 1e-320, 1 + 2j],
    "texts": ["", "a\nb", "ü\ud800", "\0"],
    "bytes": [b"", b"\x00\xff", bytearray(b"ab")],
    "containers": ([], (), {}, (1, (2, [3, {4}])), frozenset({5}), torch.Size([2, 3])),
    "keys": {1: "a", (2, 3): "b", None: "c", "d": {}, b"e": 1},
    "order": collections.OrderedDict([("z", 1), ("a", 2)]),
    "torch": [torch.float16, torch.device("cpu"), torch.arange(3).to(torch.uint16), torch.zeros(0)],
    "numpy": [np.float64(0.1), np.int8(-3), np.arange(6).reshape(2, 3)[:, ::2], np.array("text"), np.bool_(True)],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str) -> None:
    packer = Packer()
    packed = json.loads(json.dumps(packer.pack(VALUES[name], "it")))
    back = unpack(packed, packer.tensors.__getitem__)
    assert repr(back) == repr(VALUES[name]) and type(back) is type(VALUES[name])


def test_streams_come_back_as_they_were() -> None:
    packer = Packer()
    assert unpack(packer.pack(io.BytesIO(b"abc"), "it"), packer.tensors.__getitem__).read() == b"abc"


@pytest.mark.parametrize("value", [lambda: 1, type("T", (), {})(), nn.Linear(1, 1), np.array([object()]), slice(1)])
def test_values_without_a_form(value: object) -> None:
    with pytest.raises(InputError, match=r"^it is or holds a "):
        Packer().pack([{"a": value}], "it")


def test_a_value_that_holds_itself() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(InputError, match="it is nested too deeply"):
        Packer().pack(value, "it")


def test_modules_of_compiled_blocks_go_by_their_own_names() -> None:
    model = make(Warm)
    model.head.calls = 3
    packer = Packer()
    packed = pack_module(model, packer)
    other = make(Warm)
    other.head = torch.compile(other.head)
    unpack_module(other, packed, packer.tensors.__getitem__)
    assert other.head._orig_mod.calls == 3 and list(pack_module(other, Packer())["extra"]) == ["head"]


# --- Buffers that no state_dict has ---------------------------------------------------------------------------


class Remembering(nn.Linear):
    """Counts in a buffer that is replaced, averages in one that is written to, and keeps a cache that grows."""

    def __init__(self, inputs: int = 6, outputs: int = 4):
        super().__init__(inputs, outputs)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("average", torch.zeros(inputs), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("table", torch.ones(1000, 1000).triu(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.cache = x.detach().sum(1, keepdim=True) if self.cache is None else self.cache[: len(x)] + 0.5
        return super().forward(x - self.average) * (1 + 0.01 * self.count) + self.cache.mean()


def remembering() -> nn.Module:
    model = make()
    model.head = Remembering()
    with torch.no_grad():
        model.head.weight.fill_(0.1)
        model.head.bias.zero_()
    return model


def test_buffers_that_are_not_persistent_are_restored_where_the_run_writes_them(tmp_path: Path) -> None:
    whole, resumed = remembering(), remembering()
    run(whole, output_dir=tmp_path, checkpointing_steps=3)
    run(resumed, output_dir=tmp_path, checkpointing_steps=3, resume_from_checkpoint=tmp_path / "checkpoint-3")
    again = remembering()
    run(again, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-9")  # of the resumed run
    for model in (resumed, again):
        assert identical(dict(whole.named_buffers()), dict(model.named_buffers()))
        assert identical(weights(whole), weights(model))
    for folder in tmp_path.glob("checkpoint-*"):
        packed = json.loads((folder / "state.json").read_text())["packed"]["model"]["buffers"]
        assert sorted(packed) == ["head.average", "head.cache", "head.count"], "tables that are only read stay out"
