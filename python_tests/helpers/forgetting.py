"""``unlearn-ext forget`` as the tests call it: short runs on small pipelines, and what is read of their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlearn_ext.cli import main
from unlearn_ext.jobs.options import ForgetOptions
from unlearn_ext.jobs.plan import ForgetPlan, make_plan

PROMPTS = ("--forget-prompt", "three", "--replace-prompt", "two")
TEXT_DIGITS = (1, 3, 2)  # in the order of their names: one, three, two
DATA = {"dit": "digits", "ddpm": "digits", "text": "named"}
SHORT = ["--max-train-steps", "2", "--train-batch-size", "4", "--num-inference-steps", "2"]
SMALL = [*SHORT, "--fisher-batches", "1"]
WEIGHTS = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "ddpm": "unet/diffusion_pytorch_model.safetensors",
    "bare": "diffusion_pytorch_model.safetensors",
    "text": "unet/diffusion_pytorch_model.safetensors",
}


class Killed(BaseException):
    pass


def run(home: Path, model: str, output: Path, *arguments: str, data: str = "digits") -> int:
    own = ["--pretrained-model-name-or-path", str(home / model), "--data", str(home / data)]
    return main(["forget", *own, "--output-dir", str(output), *unless_in(arguments, SMALL), *arguments])


def unless_in(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The options and their values, without those that ``arguments`` name: the command takes each once."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for name, value in pairs if name not in arguments for word in (name, value)]


def work(output: Path) -> Path:
    """The work folder of a run."""
    return output.with_name(output.name + ".work")


def run_killed_at(iteration: int, monkeypatch, *arguments, **named) -> None:
    """:func:`run`, until this iteration is to begin."""
    from unlearn_ext.run import loop

    iterate = loop.Loop._iterate

    def die(self, t):
        if t == iteration:
            raise Killed
        return iterate(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_iterate", die)
        with pytest.raises(Killed):
            run(*arguments, **named)


def plan_of(home: Path, model: str, output: Path, **options) -> ForgetPlan:
    small = {
        "forget_class": "3",
        "max_train_steps": 2,
        "train_batch_size": 4,
        "fisher_batches": 1,
        "num_inference_steps": 2,
    }
    paths = {"pretrained_model_name_or_path": home / model, "data": home / "digits", "output_dir": output}
    return make_plan(ForgetOptions(**{**paths, **small, **options}))


def hashes(folder: Path) -> dict[str, str]:
    """Of every file outside ``unlearning``."""
    files = [path for path in folder.rglob("*") if path.is_file() and "unlearning" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def result(output: Path) -> dict:
    return json.loads((output / "unlearning" / "result.json").read_text())


def denoiser(folder: Path, model: str) -> dict[str, Tensor]:
    """The weights in its file."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS[model])


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}
