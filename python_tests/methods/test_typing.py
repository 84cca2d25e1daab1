"""What type checkers see: a preset is of its own class."""

from __future__ import annotations

from typing import TypeVar, get_args, get_origin, get_type_hints

import pytest

from unlearn_ext.methods import METHODS, Method


def test_a_preset_is_annotated_as_its_own_class() -> None:
    hints = get_type_hints(Method.preset.__func__)
    variable = hints["return"]
    assert isinstance(variable, TypeVar) and get_origin(hints["cls"]) is type and get_args(hints["cls"]) == (variable,)
    assert get_type_hints(Method)  # nothing that only a checker can import
    bound = variable.__bound__
    assert bound is Method or bound.__forward_arg__ == "Method"


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_of_their_class(name) -> None:
    kind = METHODS[name]
    assert all(type(kind.preset(preset)) is kind for preset in kind.presets)
    assert "preset" not in vars(kind)  # an override could say something else
