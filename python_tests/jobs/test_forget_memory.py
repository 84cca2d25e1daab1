"""``unlearn-ext forget`` with less memory: the same result, or, in bfloat16, one that is close to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import denoiser, plan_of, result, run, run_killed_at
from helpers.pipelines import NAMES

from unlearn_ext import InputError
from unlearn_ext.jobs.dry_run import estimate_run
from unlearn_ext.jobs.run import ForgetRun
from unlearn_ext.run import loop
from unlearn_ext.saliency import SaliencyMask

WHAT = {"text": ("--forget-prompt", "three", "--replace-prompt", "two")}
DATA = {"text": "named"}
Forgotten = Callable[..., Path]


@pytest.fixture(scope="module")
def home(home: Path) -> Path:
    for name in set(NAMES) - {"one", "two", "three"}:
        shutil.rmtree(home / "named" / name)
    return home


def forget(home: Path, model: str, out: Path, *arguments: str) -> int:
    return run(home, model, out, *WHAT.get(model, ("--forget-class", "3")), *arguments, data=DATA.get(model, "digits"))


@pytest.fixture(scope="module")
def forgotten(home: Path, tmp_path_factory) -> Forgotten:
    """The folder that a run with these arguments writes; each is run once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(model: str, *arguments: str) -> Path:
        if (key := (model, *arguments)) not in made:
            made[key] = tmp_path_factory.mktemp("run") / "out"
            assert forget(home, model, made[key], *arguments) == 0
        return made[key]

    return make


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit", "ddpm", "text"])
@pytest.mark.parametrize(
    "arguments", [("--optimizer-in-backward",), ("--fisher-storage", "host"), ("--fisher-storage", "disk")], ids=str
)
def test_the_same_weights_and_mask_with_less(forgotten: Forgotten, model: str, arguments: tuple[str, ...]) -> None:
    plain, other = forgotten(model), forgotten(model, *arguments)
    assert identical(denoiser(plain, model), denoiser(other, model))
    masks = [SaliencyMask.load(folder / "unlearning" / "mask.safetensors") for folder in (plain, other)]
    assert masks[0] == masks[1] and masks[0].metadata == masks[1].metadata
    assert files(plain) == files(other), "nothing of the Fisher is left"


def wide(model: str, home: Path) -> dict[str, Tensor]:
    return denoiser(home / model, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit", "ddpm", "text"])
def test_bfloat16_weights_go_about_the_same_way(home: Path, forgotten: Forgotten, model: str) -> None:
    before = {name: value.bfloat16().float() for name, value in wide(model, home).items()}
    after = denoiser(forgotten(model, "--weights-dtype", "bfloat16", "--learning-rate", "1e-3"), model)
    full = denoiser(forgotten(model, "--learning-rate", "1e-3"), model)
    assert all(value.dtype == torch.float32 for value in after.values())
    steps, plain = {}, {}
    for name, value in after.items():
        if torch.equal(value, wide(model, home)[name]):  # a table, or a weight that nothing moves
            continue
        assert torch.equal(value, value.bfloat16().float()), name
        steps[name], plain[name] = value - before[name], full[name] - wide(model, home)[name]
    a, b = (torch.cat([t.flatten().double() for t in each.values()]) for each in (steps, plain))
    # A step of 1e-3 is a quarter of a unit in the last place of a weight of 0.5: noise beside it is expected, no bias.
    assert float(a @ b / (b @ b)) == pytest.approx(1.0, abs=0.25)
    assert result(forgotten(model, "--weights-dtype", "bfloat16", "--learning-rate", "1e-3"))["method"][
        "stochastic_rounding"
    ]


@pytest.mark.slow
def test_frozen_weights_are_written_as_they_were(home: Path, forgotten: Forgotten) -> None:
    after = denoiser(forgotten("text", "--weights-dtype", "bfloat16", "--trained-weights", "cross-attention"), "text")
    moved = {name for name, value in wide("text", home).items() if not torch.equal(value, after[name])}
    assert moved and all("attn2" in name for name in moved)


@pytest.mark.slow
def test_bfloat16_follows_the_seed(home: Path, forgotten: Forgotten, tmp_path: Path) -> None:
    own = ("--weights-dtype", "bfloat16")
    first = denoiser(forgotten("ddpm", *own), "ddpm")
    torch.rand(5)
    assert forget(home, "ddpm", tmp_path / "again", *own) == 0
    assert identical(first, denoiser(tmp_path / "again", "ddpm"))
    assert forget(home, "ddpm", tmp_path / "other", *own, "--seed", "1") == 0
    assert not identical(first, denoiser(tmp_path / "other", "ddpm"))


def test_a_killed_run_in_bfloat16_is_resumed_to_the_same_weights(
    home: Path, forgotten: Forgotten, tmp_path: Path, monkeypatch
) -> None:
    own = ("--weights-dtype", "bfloat16", "--optimizer-in-backward", "--fisher-storage", "disk")
    saving = ("--forget-class", "3", *own, "--checkpointing-steps", "1")
    run_killed_at(1, monkeypatch, home, "dit", tmp_path / "out", *saving)
    torch.rand(5)
    assert (
        forget(home, "dit", tmp_path / "out", *own, "--checkpointing-steps", "1", "--resume-from-checkpoint", "latest")
        == 0
    )
    assert identical(denoiser(forgotten("dit", *own), "dit"), denoiser(tmp_path / "out", "dit"))


@pytest.mark.slow
def test_a_mask_is_for_the_weights_that_it_was_measured_on(home: Path, forgotten: Forgotten, tmp_path: Path) -> None:
    """Rounded ones are others."""
    own = ("--weights-dtype", "bfloat16")
    first = forgotten("ddpm", *own)
    mask = str(first / "unlearning" / "mask.safetensors")
    given = {"mask": Path(mask), "fisher_batches": None}
    ForgetRun(plan_of(home, "ddpm", tmp_path / "again", weights_dtype="bfloat16", **given)).run()
    again = tmp_path / "again" / "unlearning" / "mask.safetensors"
    assert SaliencyMask.load(again) == SaliencyMask.load(mask)
    with pytest.raises(InputError, match="was made for other weights"):
        plan_of(home, "ddpm", tmp_path / "other", **given)


@pytest.mark.slow
def test_averages_of_bfloat16_weights_are_written_in_full(forgotten: Forgotten) -> None:
    own = ("--weights-dtype", "bfloat16", "--save-weights", "ema", "--ema-decay", "0.5", "--learning-rate", "1e-2")
    after = denoiser(forgotten("ddpm", *own), "ddpm")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in after.values())


def test_pictures_are_made_in_float32_before_and_after(home: Path, tmp_path: Path, monkeypatch) -> None:
    from unlearn_ext.jobs.pictures import Pictures

    seen: list[tuple[str, set[torch.dtype]]] = []
    take, start = Pictures.take, loop.Loop.start

    def dtypes(model) -> set[torch.dtype]:
        return {p.dtype for p in model.parameters()}

    def watched(self, when, progress):
        seen.append((when, dtypes(self.pretrained.denoiser)))
        return take(self, when, progress)

    def started(self, checkpoint):
        seen.append(("run", dtypes(self.model)))
        return start(self, checkpoint)

    monkeypatch.setattr(Pictures, "take", watched)
    monkeypatch.setattr(loop.Loop, "start", started)
    plan = plan_of(home, "ddpm", tmp_path / "out", weights_dtype="bfloat16")
    estimate_run(plan)
    assert dtypes(plan.model) == {torch.bfloat16}, "a trial leaves no trace"
    ForgetRun(plan).run()
    assert seen == [("before", {torch.float32}), ("run", {torch.bfloat16}), ("after", {torch.float32})]


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (
            "dit",
            ["--optimizer-in-backward", "--gradient-accumulation-steps", "2"],
            "--optimizer-in-backward frees each gradient at once, and --gradient-accumulation-steps needs all of them",
        ),
        ("dit", ["--fisher-storage", "host", "--mask-fraction", "0.5"], "--fisher-storage host makes a mask tensor by"),
    ],
)
def test_what_does_not_go_together_is_refused(home, tmp_path, capsys, model, arguments, words) -> None:
    assert forget(home, model, tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_fp16_is_refused_beside_bfloat16_and_steps_in_the_backward_pass(home: Path, tmp_path: Path) -> None:
    for option, words in (
        ({"weights_dtype": "bfloat16"}, "--weights-dtype bfloat16 computes in bf16: leave out --mixed-precision fp16"),
        ({"optimizer_in_backward": True}, "and --mixed-precision fp16 needs all of them: leave one of them out"),
        ({"weights_dtype": "float8"}, "--weights-dtype: expected one of float32, bfloat16, got 'float8'"),
    ):
        with pytest.raises(InputError, match=words):
            plan_of(home, "dit", tmp_path / "out", mixed_precision="fp16", device="cuda", **option)
