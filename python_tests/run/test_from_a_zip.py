"""The package without a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import unlearn_ext

PROGRAM = Path(__file__).parents[1] / "helpers" / "programs" / "run_from_zip.py"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("backend", ["python", "native"])
def test_a_zip_runs_on_the_python_backend_or_says_what_it_lacks(backend, tmp_path) -> None:
    package = Path(unlearn_ext.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in package.rglob("*.py"):
            archive.write(path, path.relative_to(package.parent))
    environment = {**os.environ, "UNLEARN_EXT_BACKEND": backend}
    command = [sys.executable, "-I", str(PROGRAM), str(tmp_path / "package.zip")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    if backend == "python":
        assert process.returncode == 0 and process.stdout.startswith("python "), process.stderr
    else:
        last = process.stderr.strip().splitlines()[-1]
        assert process.returncode and "unlearn_ext is imported from inside an archive" in last
