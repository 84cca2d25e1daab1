"""Names that begin with an underscore belong to their room. (Which room imports which, import-linter holds.)"""

from __future__ import annotations

import ast
from pathlib import Path

import unlearn_ext

PACKAGE = Path(unlearn_ext.__file__).parent


def private_imports(source: str, room: str, depth: int) -> list[str]:
    """The private names that a module of a room, so many folders below the package, takes from another room."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").removeprefix("unlearn_ext.")
        if node.level and node.level != depth + 1:  # within the room
            continue
        if not node.level and not (node.module or "").startswith("unlearn_ext"):
            continue
        if module.partition(".")[0] != room:
            taken = [*module.split("."), *(alias.name for alias in node.names)]
            found += [name for name in taken if name.startswith("_") and not name.endswith("__")]
    return found


def test_no_room_takes_a_private_name_of_another() -> None:
    for path in PACKAGE.rglob("*.py"):
        *folders, _ = path.relative_to(PACKAGE).parts
        assert private_imports(path.read_text(), folders[0] if folders else "", len(folders)) == [], path


def test_what_is_private() -> None:
    assert private_imports("from ..run._loop import save", "jobs", 1) == ["_loop"]
    assert private_imports("from unlearn_ext.run.loop import Loop, _save", "jobs", 1) == ["_save"]
    assert private_imports("from ..run.loop import Loop\nfrom .work import _names\nfrom x import _y", "jobs", 1) == []
    assert private_imports("from ..version import __version__", "cli", 1) == []
