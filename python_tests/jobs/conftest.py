"""Small pipelines and folders of digits, made once in a session; each file has a copy of its own to run on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def few_prompts(made_once: Path, tmp_path_factory) -> Path:
    """As ``home``, but ``named`` has the folders one, two and three only."""
    from helpers.forgetting import TEXT_DIGITS
    from helpers.pipelines import NAMES

    home = shutil.copytree(made_once, tmp_path_factory.mktemp("home"), dirs_exist_ok=True)
    for name in set(NAMES) - {NAMES[digit] for digit in TEXT_DIGITS}:
        shutil.rmtree(home / "named" / name)
    return home


@pytest.fixture(scope="session")
def forgotten(few_prompts: Path, tmp_path_factory) -> Callable[..., Path]:
    """The folder that a run with these arguments writes; each is run once."""
    from helpers.forgetting import DATA, PROMPTS, result, run

    made: dict[tuple[str, ...], Path] = {}

    def make(model: str, *arguments: str) -> Path:
        if (key := (model, *arguments)) not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            what = PROMPTS if model == "text" else ("--forget-class", "3")
            code = run(few_prompts, model, out, *what, *arguments, "--keep-work", data=DATA[model])
            assert code == (3 if "unmoved" in result(out)["warnings"] else 0)
            made[key] = out
        return made[key]

    return make
