"""Rule momentum has a momentum where nobody says otherwise, and what was released stays what it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.models import make

from unlearn_ext.methods import METHODS, SFRon, parse

# Rule and momentum of each preset, as published; presets that name neither have the class's own.
PUBLISHED = {("momentum", 0.9), ("adam", 0.0), ("adamw", 0.0)}


@pytest.mark.parametrize(
    ("settings", "momentum"),
    [
        ("", 0.0),
        (":lr=0.1", 0.0),
        (":rule=momentum", 0.9),
        (":rule=momentum,momentum=0.5", 0.5),
        (":rule=momentum,momentum=0", 0.0),
        (":momentum=0.5", 0.5),
        (":rule=sgd", 0.0),
        (":rule=adamw", 0.0),
        (":rule=adam,dual_state=true,forget_rule=momentum", 0.9),
        (":dual_state=true,forget_rule=adam", 0.0),
        ("@ddpm-cifar10:rule=momentum", 0.9),
        ("@cifar10-resnet18:lr=1", 0.9),
    ],
)
def test_the_momentum_of_a_method(settings: str, momentum: float) -> None:
    method = parse(f"sfron{settings}")
    assert method.momentum == momentum and method.settings()["momentum"] == momentum
    optimizer = method.make_optimizer(method.groups(make().named_parameters()), None)
    assert {group.get("momentum", 0.0) for group in optimizer.param_groups} == {
        momentum
    }  # rules that read none have none
    assert method.has_idle_momentum == (settings == ":rule=momentum,momentum=0")


def test_a_groups_own_momentum_is_one() -> None:
    assert not SFRon(rule="momentum", momentum=0.0, param_groups={"*": {"momentum": 0.5}}).has_idle_momentum


def test_changing_a_setting_keeps_what_was_not_given() -> None:
    assert dataclasses.replace(SFRon(rule="momentum"), rule="sgd").momentum == 0.0
    assert dataclasses.replace(SFRon(), lr=1.0) == SFRon(lr=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_the_published_ones(name: str) -> None:
    for preset, settings in METHODS[name].presets.items():
        method = METHODS[name].preset(preset)
        assert (method.rule, method.momentum) in PUBLISHED
        assert method.momentum == settings.get("momentum", 0.0), "a preset names its momentum"


def test_states_and_settings_hold_pythons_own_classes(tmp_path) -> None:
    """A state has to load where no class is allowed."""
    method = SFRon()
    assert {type(method.settings()[name]) for name in ("rule", "momentum", "gamma")} == {str, float}
    optimizer = method.make_optimizer(make().named_parameters(), None)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
