"""What importing costs: no torch before it is needed, and the same package from every folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import environment

import unlearn_ext

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, directory: Path, *options: str, **changes: object) -> str:
    command, settings = [sys.executable, *options, "-c", code], {"capture_output": True, "text": True, "check": True}
    return subprocess.run(command, cwd=directory, env=environment(**changes), **settings).stdout


@pytest.mark.parametrize("arguments", ([], ["forget"], ["demo"], ["compare"], ["profile"]))
def test_help_loads_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from unlearn_ext import cli
code = cli.main({[*arguments, "--help"]!r})
print(code, "torch" in sys.modules, "numpy" in sys.modules)
"""
    assert run(code, tmp_path).splitlines()[-1] == "0 False False"


def test_names_are_loaded_when_they_are_used() -> None:
    for name in unlearn_ext.__all__:
        assert getattr(unlearn_ext, name) is not None and name in dir(unlearn_ext)
    with pytest.raises(AttributeError, match="module 'unlearn_ext' has no attribute 'Unlearned'"):
        unlearn_ext.Unlearned  # noqa: B018


@pytest.mark.build
def test_an_editable_install_is_found_above_its_checkout(tmp_path: Path) -> None:
    """There a checkout's own folder passes for a package without an __init__."""
    checkout = tmp_path / "unlearn_ext"
    for name in ("unlearn_ext", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*install, "--editable", str(checkout)], check=True, capture_output=True)
    code = f"import site; site.addsitedir({str(target)!r}); import unlearn_ext; print(unlearn_ext.__file__)"
    found = run(code, tmp_path, "-S", PYTHONPATH=None).strip()  # without what is installed here
    assert found == str(checkout / "unlearn_ext" / "__init__.py")
