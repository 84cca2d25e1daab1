"""Forms of JSON documents, compared before anything in them is used."""

from __future__ import annotations

from typing import Any

__all__ = ["EACH", "NUMBER", "OPTIONAL", "fits"]

EACH = "each"  # key of a form of a dict: of all its values
NUMBER = (int, float)
OPTIONAL = type(None)


def fits(value: Any, form: Any) -> bool:
    """Whether a value is of a form.

    Args:
        form: a type or a tuple of types, of which bool is no int; a list, of the form of all items; or a dict, of the
            forms of some values that have to be there, by key, or of all under :data:`EACH`.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if EACH in form:
            return all(fits(item, form[EACH]) for item in value.values())
        return all(key in value and fits(value[key], each) for key, each in form.items())
    kinds = form if isinstance(form, tuple) else (form,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
