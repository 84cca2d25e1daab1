"""Which weights ``--trained-weights`` means: patterns of names as ``param_groups`` has, or regular expressions."""

from __future__ import annotations

import re

import pytest
from torch import nn

from unlearn_ext.errors import InputError
from unlearn_ext.methods import SFRon
from unlearn_ext.models.weights import select_trained


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Linear(2, 2)
        self.down = nn.ModuleDict({"conv_in": nn.Linear(2, 2), "norm1": nn.LayerNorm(2), "norm2": nn.LayerNorm(2)})


NAMES = [name for name, _ in Net().named_parameters()]


@pytest.mark.parametrize("pattern", ["*.norm1.weight", "*norm?.*", "down.*", "*", "down.norm1.*", "*.norm[1].bias"])
def test_a_pattern_means_what_it_means_in_param_groups(pattern: str) -> None:
    net = Net()
    chosen = select_trained(net, pattern)
    if len(chosen) < len(NAMES):
        *_, group = SFRon(param_groups={pattern: {"lr": 0.1}}).groups(Net().named_parameters())
        assert chosen == [name for name, _ in group["params"]]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == chosen


@pytest.mark.parametrize(
    "expression", ["norm1|norm2", r"norm1\.", "^down", "norm", ".*", "weight$", r"conv_in\.(weight|bias)", "n.rm[12]"]
)
def test_a_regular_expression_means_what_it_meant(expression: str) -> None:
    assert select_trained(Net(), expression) == [name for name in NAMES if re.search(expression, name)]


@pytest.mark.parametrize(
    ("both", "pattern", "expression"),
    [
        ("conv_in.*", r"^conv_in\..*$", "(conv_in.*)"),
        ("conv_in.weight", r"^conv_in\.weight$", "(conv_in.weight)"),
    ],
)
def test_what_may_mean_either_says_how_to_write_each(both: str, pattern: str, expression: str) -> None:
    net = Net()
    with pytest.raises(InputError) as error:
        select_trained(net, both)
    assert f"write {pattern!r} for the pattern, or {expression!r} for the expression" in str(error.value)
    assert all(p.requires_grad for p in net.parameters())
    first, second = select_trained(Net(), pattern), select_trained(Net(), expression)
    assert set(first) < set(second) == {name for name in NAMES if re.search(both, name)}


@pytest.mark.parametrize("nothing", ["*.nope.*", "nope", "[", "norm1.*.bias.*x"])
def test_what_fits_no_weight_is_refused(nothing: str) -> None:
    with pytest.raises(InputError, match=r"the model has none for .*; its names are such as conv_in\.weight"):
        select_trained(Net(), nothing)


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(InputError, match="a name pattern or a regular expression, got"):
        select_trained(Net(), "norm(")
