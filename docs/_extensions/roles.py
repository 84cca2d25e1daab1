"""Docstrings as the site shows them: roles, formulas and sessions become Markdown."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?(?:[^`]*\.)?([^`.]+)`")
DISPLAYED = re.compile(r"^\.\. math::\n((?: +.*(?:\n|\Z)|\n(?= ))+)", re.MULTILINE)
SESSION = re.compile(r"^>>> (?:.+(?:\n|\Z))+", re.MULTILINE)


def as_markdown(text: str) -> str:
    text = ROLE.sub(r"`\1`", text)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = DISPLAYED.sub(lambda found: f"\n$$\n{found[1].strip()}\n$$\n", text)
    return SESSION.sub(lambda found: f"```python\n{found[0].rstrip()}\n```\n", text.replace("``", "`"))


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
