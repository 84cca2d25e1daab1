"""What a method's results depend on: its own file, and where it comes from elsewhere, the package that helps it."""

from __future__ import annotations

import importlib
import sys

from unlearn_ext.comparison.keys import class_hash
from unlearn_ext.methods import Finetune, SFRon

METHOD = """
from unlearn_ext.methods import Finetune
from . import helping

class Elsewhere(Finetune):
    name = "elsewhere"
"""


def test_a_helper_of_another_package_counts(tmp_path, monkeypatch) -> None:
    package = tmp_path / "elsewhere_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .method import Elsewhere\n")
    (package / "method.py").write_text(METHOD)
    (package / "helping.py").write_text("STRENGTH = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    kind = importlib.import_module("elsewhere_package").Elsewhere
    before = class_hash(kind)
    (package / "notes.txt").write_text("no source")
    assert class_hash(kind) == before
    (package / "helping.py").write_text("STRENGTH = 2.0\n")
    assert class_hash(kind) != before
    for name in [name for name in sys.modules if name.startswith("elsewhere_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_single_module_and_our_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "lone_module.py").write_text("from unlearn_ext.methods import Finetune\nclass Lone(Finetune): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("lone_module").Lone
    before = class_hash(kind)
    (tmp_path / "lone_module.py").write_text("from unlearn_ext.methods import Finetune\nclass Lone(Finetune): pass\n")
    assert class_hash(kind) != before
    assert class_hash(Finetune) != class_hash(SFRon)
    monkeypatch.delitem(sys.modules, "lone_module")
