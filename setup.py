"""Packaging beyond what pyproject.toml can say.

The wheel carries the C++ sources as ``unlearn_ext/csrc``, and installing compiles nothing: the library is
built on first use. To build it ahead of time instead, for machines without a compiler::

    UNLEARN_EXT_AOT=1 pip wheel . --no-deps --no-build-isolation

Such a wheel is tied to the platform but to no Python version, and holds one library per instruction set; the
best one is chosen at run time. It needs torch where it is built, hence no isolation.
"""

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
AHEAD_OF_TIME = os.environ.get("UNLEARN_EXT_AOT") == "1"
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


class BuildPackage(build_py):
    """Adds the C++ sources and, when asked, the libraries. An editable install has csrc beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._sources().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))
        if AHEAD_OF_TIME:
            self._compile()

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [] if self.editable_mode else [str(target) for target in self._sources().values()]
        return super().get_outputs(include_bytecode) + added

    def _sources(self) -> dict[Path, Path]:
        csrc = ROOT / "csrc"
        files = (path for path in sorted(csrc.rglob("*")) if path.suffix in SOURCE_SUFFIXES)
        return {path: Path(self.build_lib, "unlearn_ext", "csrc", path.relative_to(csrc)) for path in files}

    def _compile(self) -> None:
        recipes, building = _native("recipes"), _native("building")
        work = Path(self.get_finalized_command("build").build_temp).absolute()
        target = Path(self.build_lib, "unlearn_ext", "_lib")
        self.mkpath(str(work))
        self.mkpath(str(target))
        for recipe in recipes.aot_recipes():
            library = building.compile_recipe(recipe, work / recipe.file_name)
            library.chmod(0o755)  # a cache's are for their user alone
            shutil.copy2(library, target)


class PlatformDistribution(Distribution):
    """A distribution whose wheel is tied to the platform exactly when it holds libraries."""

    def has_ext_modules(self) -> bool:
        return AHEAD_OF_TIME


class BuildWheel(bdist_wheel):
    """Tags a wheel with libraries for every Python 3: they use no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if AHEAD_OF_TIME else (python, abi, platform)


def _native(name: str) -> types.ModuleType:
    """A module of unlearn_ext/native without the package's __init__, which imports what need not be installed here."""
    package = types.ModuleType("unlearn_ext_sources")
    package.__path__ = [str(ROOT / "unlearn_ext")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.native.{name}")


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel},
)
