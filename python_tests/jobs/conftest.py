"""Small pipelines and folders of digits, made once in a session; each file has a copy of its own to run on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from helpers import pipelines

    home = tmp_path_factory.mktemp("pipelines")
    pipelines.save_digit_folders(home / "digits", per_class=4)
    pipelines.save_digit_folders(home / "named", per_class=4, names=pipelines.NAMES)
    pipelines.save_dit_pipeline(home / "dit")
    pipelines.save_ddpm_pipeline(home / "ddpm")
    pipelines.save_text_pipeline(home / "text")
    return home


@pytest.fixture(scope="module")
def home(made_once: Path, tmp_path_factory) -> Path:
    """``digits`` and ``named`` (four pictures a class, folders called 0 and zero), ``dit``, ``ddpm`` and ``text``."""
    return shutil.copytree(made_once, tmp_path_factory.mktemp("home"), dirs_exist_ok=True)
