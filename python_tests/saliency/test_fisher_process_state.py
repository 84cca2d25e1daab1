"""Fisher diagonals and gradient sums: the same in whatever state the process is, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layouts import same_bits
from helpers.models import ConvNet, batches, make
from helpers.process_state import STATES, Around
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.saliency import FisherDiagonal, SaliencyMask
from unlearn_ext.saliency.gradient import GradientSum
from unlearn_ext.tasks import Classification

KINDS: dict[str, tuple[type[FisherDiagonal], dict[str, Any]]] = {
    "batch": (FisherDiagonal, {"max_norm": 0.5}),
    "in backward": (FisherDiagonal, {"max_norm": 0.5, "in_backward": True}),
    "per sample": (FisherDiagonal, {"per_sample": True, "chunk": 3}),
    "one by one": (FisherDiagonal, {"per_sample": True, "chunk": 1}),
    "gradient": (GradientSum, {}),
    "gradient in backward": (GradientSum, {"in_backward": True}),
}
PRECISE = {name: around for name, around in STATES.items() if name != "autocast"}


def measured(kind: str, model: nn.Module, data: Any) -> dict[str, Tensor]:
    diagonal, options = KINDS[kind]
    return diagonal(model, Classification(), **options).measure(data).sums


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("around", PRECISE.values(), ids=PRECISE.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_does_not_depend_on_the_process(kind: str, around: Around) -> None:
    model, data = make(ConvNet), batches(2, 6, seed=1)
    expected = measured(kind, model, data)
    with around():
        got = measured(kind, model, data)
    assert_same(expected, got)
    assert not any(total.is_inference() for total in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_data_made_in_inference_mode(kind: str) -> None:
    model, data = make(ConvNet), batches(2, 6, seed=1)
    with torch.inference_mode():
        cloned = [(images.clone(), labels.clone()) for images, labels in data]
        iterator = ((images.clone(), labels.clone()) for images, labels in data)
        assert_same(measured(kind, model, data), measured(kind, model, iterator))
    assert cloned[0][0].is_inference()
    assert_same(measured(kind, model, data), measured(kind, model, cloned))


class Identity(torch.autograd.Function):
    """Notes whether its backward pass runs under autocast."""

    seen: bool | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Identity.seen = torch.is_autocast_enabled("cpu")
        return gradient


class Noting(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return Identity.apply(super().forward(x))


@pytest.mark.parametrize("kind", ("batch", "in backward", "one by one", "gradient"))
def test_an_autocast_around_it_is_of_the_forward_pass(kind: str) -> None:
    Identity.seen = None
    with torch.autocast("cpu", torch.bfloat16):
        measured(kind, make(Noting), batches(1, 4, seed=1))
    assert Identity.seen is False


@pytest.mark.parametrize("kind", KINDS)
def test_float16_around_it_makes_no_squares_of_zero(kind: str) -> None:
    """Bfloat16 is followed, as in a run."""
    data = batches(1, 4, seed=1)
    expected = measured(kind, make(), data)
    with torch.autocast("cpu", torch.float16):
        found = measured(kind, make(), data)
    assert_same(expected, found)
    if kind == "per sample":  # torch.func has no batch normalisation under autocast
        return
    with torch.autocast("cpu", torch.bfloat16):
        rounded = measured(kind, make(), data)
    assert not all(torch.equal(rounded[name], expected[name]) for name in expected)


# --- Gradients and parameters that are refused ----------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, sparse: bool):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.phase.abs()


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_are_none(kind: str) -> None:
    with pytest.raises(InputError, match="set is no iterable of batches but None: pass a DataLoader"):
        measured(kind, make(), None)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_refused_by_name(kind: str) -> None:
    data = [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))]
    model = make(Words, sparse=True)
    name = "Saliency" if "gradient" in kind else "Fisher"
    with pytest.raises(InputError, match=rf"^{name}: the gradient of table\.weight is sparse; make it dense") as caught:
        measured(kind, model, data)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())  # and nothing is left for the next step
    measured(kind, make(Words, sparse=False), data)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters_are_refused_by_name(kind: str) -> None:
    data = [(torch.ones(3, 4), torch.tensor([0, 1, 0]))]
    model = make(Complex)
    with pytest.raises(InputError, match=r"^the parameter phase is of torch\.complex64"):
        measured(kind, model, data)
    model.phase.requires_grad_(False)
    assert set(measured(kind, model, data)) == {"head.weight", "head.bias"}


# --- Masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", STATES.values(), ids=STATES.keys())
def test_masks_do_not_depend_on_the_process(around: Around, tmp_path) -> None:
    model, data = make(ConvNet), batches(2, 6, seed=1)
    named = list(model.named_parameters())
    forget, retain = (FisherDiagonal(model, Classification()).measure(data[i : i + 1]) for i in (0, 1))
    scores = {name: total.double() for name, total in forget.sums.items()}

    def work(folder) -> list[Any]:
        folder.mkdir()
        masks = [
            SaliencyMask.from_fisher(forget, retain),
            SaliencyMask.from_fisher(forget, retain, mask_fraction=0.3),
            SaliencyMask.top_fraction(scores, 0.25),
        ]
        masks[0].save(folder / "mask.safetensors")
        masks[0].to_pt(folder / "mask.pt")
        masks += [SaliencyMask.load(folder / "mask.safetensors"), SaliencyMask.from_pt(folder / "mask.pt")]
        bound = [words for mask in masks for words in mask.bind(named)]
        return [*masks, *bound, *masks[1].unpack().values()]

    expected = work(tmp_path / "plain")
    with around():
        got = work(tmp_path / "other")
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", ("float64 by default", "bfloat16 by default", "meta by default"))
def test_released_files_with_numbers_for_tensors(name: str, tmp_path) -> None:
    torch.save({"a": torch.tensor([1.0, 2.0]), "b": 0}, tmp_path / "f.pt")
    torch.save({"a": torch.tensor([2.0, 1.0]), "b": 0}, tmp_path / "r.pt")
    torch.save({"a": torch.tensor([1, 0]), "b": 0}, tmp_path / "mask.pt")
    named = [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(3)))]

    def read() -> tuple[SaliencyMask, SaliencyMask]:
        fisher = SaliencyMask.from_fisher_pt(tmp_path / "f.pt", tmp_path / "r.pt", named)
        return fisher, SaliencyMask.from_pt(tmp_path / "mask.pt", named)

    expected = read()
    with STATES[name]():
        assert read() == expected
