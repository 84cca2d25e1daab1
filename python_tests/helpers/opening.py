"""Diffusers folders for tests of what is opened: how each is built, edited, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import pipelines

from unlearn_ext.errors import InputError

__all__ = ["BUILDERS", "edit", "refused"]

BUILDERS = {
    "dit": pipelines.save_dit_pipeline,
    "ddpm": pipelines.save_ddpm_pipeline,
    "bare": pipelines.save_model_and_scheduler,
    "parts": lambda folder: pipelines.save_model_and_scheduler(folder, subfolder="unet"),
    "text": pipelines.save_text_pipeline,
}


def edit(path: Path, **changes) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(match, action, *args, **kwargs) -> None:
    """The call is refused with one sentence that matches."""
    with pytest.raises(InputError, match=match) as caught:
        action(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
