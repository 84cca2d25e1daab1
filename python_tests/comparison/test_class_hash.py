"""What a method's results depend on: its own file, and where it comes from elsewhere, the package that helps it."""

from __future__ import annotations

import importlib
import sys

import pytest

from unlearn_ext.comparison.keys import class_hash
from unlearn_ext.methods import Finetune, SFRon

METHOD = "from unlearn_ext.methods import Finetune\nclass Elsewhere(Finetune): ...\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory to import from, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("elsewhere_package", "lone_module"))]:
        del sys.modules[name]


def test_a_helper_of_another_package_counts(elsewhere) -> None:
    package = elsewhere / "elsewhere_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .method import Elsewhere\n")
    (package / "method.py").write_text(METHOD)
    (package / "inner" / "helping.py").write_text("STRENGTH = 1.0\n")
    kind = importlib.import_module("elsewhere_package").Elsewhere
    before = class_hash(kind)
    (package / "notes.txt").write_text("no source")
    assert class_hash(kind) == before
    (package / "inner" / "helping.py").write_text("STRENGTH = 2.0\n")
    assert class_hash(kind) != before


def test_a_single_module_and_our_own(elsewhere) -> None:
    (elsewhere / "lone_module.py").write_text(METHOD)
    kind = importlib.import_module("lone_module").Elsewhere
    before = class_hash(kind)
    (elsewhere / "neighbour.py").write_text("STRENGTH = 1.0\n")
    assert class_hash(kind) == before
    (elsewhere / "lone_module.py").write_text(METHOD.replace("...", "pass"))
    assert class_hash(kind) != before
    assert class_hash(Finetune) != class_hash(SFRon)
