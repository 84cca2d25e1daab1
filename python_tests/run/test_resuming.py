"""Checkpoints and resuming: the same run, or one clear sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.models import batches, make
from helpers.processes import environment
from helpers.runs import growing, identical, loaders, method, run, weights
from torch import nn

from unlearn_ext import InputError, SaliencyMask, Unlearner
from unlearn_ext.tasks import Classification
from unlearn_ext.utils.seal import seal

RESUMABLE = {
    "momentum": {"rule": "momentum"},
    "adamw, slow": {"rule": "adamw", "lr": 1e-3, "slow_rate": 0.5, "slow_freq": 5},
    "dual": {"rule": "momentum", "dual_state": True, "forget_rule": "adam", "forget_lr": 1e-3},
    "joint, protected": {"update": "joint", "mask_scope": "all", "protect": True},
    "groups, protected": {
        "mask_scope": "all",
        "protect": True,
        "param_groups": {"conv.bias": {"lr": 0.01}, "norm.bias": {"lr": 0.03}},
    },
}


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("changes", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_a_resumed_run_is_the_uninterrupted_one(changes, log_every, tmp_path) -> None:
    whole, interrupted = make(dropout=0.3), make(dropout=0.3)
    torch.manual_seed(7)
    expected = run(whole, loaders(), changes, log_every=log_every)
    torch.manual_seed(7)
    run(
        interrupted,
        loaders(),
        changes,
        output_dir=tmp_path,
        checkpointing_steps=7,
        evaluate=lambda model, step: step == 9,
        evaluate_every=1,
        log_every=log_every,
    )
    torch.manual_seed(99)  # whatever the new process has drawn before
    resumed = make(seed=4, dropout=0.3)
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": "latest", "log_every": log_every}
    result = run(resumed, loaders(seed=50), changes, **resume)
    assert identical(weights(whole), weights(resumed))
    assert result.history == expected.history
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == expected.history
    assert result.counts == expected.counts and result.mask == expected.mask
    assert result.moved_protected == expected.moved_protected


def test_a_checkpoint_from_before_a_setting_had_its_default(tmp_path) -> None:
    whole = run(make(), output_dir=tmp_path, checkpointing_steps=6)
    (state,) = tmp_path.rglob("checkpoint-6/state.json")
    document = json.loads(state.read_text())
    assert document["settings"].pop("batch_norm_statistics") == "all"
    state.write_text(json.dumps(document))
    seal(state.parent, f"run {document['run']}")
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": state.parent}
    with pytest.raises(InputError, match="written with batch_norm_statistics='all' and this run has 'retain'"):
        run(make(), changes={"batch_norm_statistics": "retain"}, **resume)
    assert run(make(), **resume).counts == whole.counts


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path) -> None:
    run(make(), output_dir=tmp_path, checkpointing_steps=6)
    with pytest.raises(InputError, match=r"written with lr=0\.02 and this run has 0\.5"):
        run(make(), changes={"lr": 0.5}, output_dir=tmp_path, resume_from_checkpoint="latest")
    other = make(classes=5)
    before = weights(other)
    with pytest.raises(InputError, match="shape"):
        run(other, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert identical(before, weights(other))


def test_groups_in_another_order_are_other_settings(tmp_path) -> None:
    """It is that of the optimizer's state."""
    groups = {"conv.*": {"lr": 0.01}, "norm.*": {"lr": 0.03}}
    run(make(), changes={"param_groups": groups}, output_dir=tmp_path, checkpointing_steps=6)
    turned = {"param_groups": dict(reversed(groups.items()))}
    with pytest.raises(InputError, match="written with param_groups="):
        run(make(), changes=turned, output_dir=tmp_path, resume_from_checkpoint="latest")


def test_a_resumed_run_in_float16_is_the_uninterrupted_one(tmp_path) -> None:
    """Both scales go on where they were."""
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    results, models = [], (make(), make())
    for model, resume in ((models[0], {}), (models[1], {"resume_from_checkpoint": tmp_path / "checkpoint-5"})):
        unlearner = Unlearner(model, Classification(), growing(), mixed_precision="fp16")
        results.append(unlearner.run(**data, output_dir=tmp_path, checkpointing_steps=5, **resume))
    assert results[0].counts == results[1].counts and results[0].history == results[1].history
    assert identical(*map(weights, models))


def test_a_run_that_was_stopped_stays_stopped(tmp_path) -> None:
    stopping = {"evaluate": lambda model, step: step >= 8, "evaluate_every": 4, "checkpointing_steps": 4}
    model = make()
    result = run(model, output_dir=tmp_path, **stopping)
    history = (tmp_path / "history.jsonl").read_text()
    for arguments in (stopping, {}):
        resumed = make(seed=4)
        again = run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest", **arguments)
        assert again.stopped_at == result.stopped_at == 8
        assert identical(weights(model), weights(resumed)) and again.mask == result.mask
        assert again.history == result.history and again.counts == result.counts and again.timings == result.timings
        assert (tmp_path / "history.jsonl").read_text() == history
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8", "history.jsonl"]
    earlier = {"resume_from_checkpoint": tmp_path / "checkpoint-4"}
    assert run(make(), **earlier, **{**stopping, "output_dir": tmp_path}).stopped_at == 8
    assert run(make(), **earlier).stopped_at is None


def test_the_history_of_an_earlier_run_is_moved_aside(tmp_path) -> None:
    kept = []
    for iterations in (3, 5, 2):
        run(make(), changes={"iterations": iterations}, output_dir=tmp_path)
        kept.append((tmp_path / "history.jsonl").read_text())
        assert kept[-1].count("\n") == iterations
    names = ("history-1.jsonl", "history-2.jsonl", "history.jsonl")
    assert [(tmp_path / name).read_text() for name in names] == kept and len(list(tmp_path.iterdir())) == 3


def interrupted(directory: Path, changes: dict | None = None, **arguments) -> Path:
    """A directory with checkpoints and a history."""
    run(make(), changes=changes, output_dir=directory, checkpointing_steps=6, **arguments)
    return directory / "checkpoint-12"


def refused(
    message: str,
    model: nn.Module,
    directory: Path,
    data: dict | None = None,
    resume: str | Path = "latest",
    **arguments,
) -> None:
    """Resuming fails in one sentence and changes neither model nor files."""
    before, history = weights(model), (directory / "history.jsonl").read_text()
    data = data or {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    with pytest.raises(InputError, match=message) as caught:
        Unlearner(model, Classification(), **arguments).run(**data, output_dir=directory, resume_from_checkpoint=resume)
    assert "\n" not in str(caught.value)
    assert identical(before, weights(model)) and (directory / "history.jsonl").read_text() == history


def test_resuming_needs_the_same_run(tmp_path) -> None:
    interrupted(tmp_path, {"gamma": None})
    own = method(gamma=None)
    frozen = make(seed=4)
    frozen.conv.requires_grad_(False)
    refused(r"of a run in which conv\.\w+ was trained: set requires_grad", frozen, tmp_path, method=own)
    words = "written with mixed_precision='no' and this run has 'bf16'"
    refused(words, make(seed=4), tmp_path, method=own, mixed_precision="bf16")
    refused("dtype", make(seed=4).double(), tmp_path, method=own)
    mask = SaliencyMask.from_dict({n: torch.ones(p.shape, dtype=torch.bool) for n, p in make().named_parameters()})
    refused("written with another mask", make(seed=4), tmp_path, method=method(gamma=None, mask=mask))
    shorter = {"forget": batches(2, 6, seed=1), "retain": batches(5, 6, seed=2)}
    refused("the forget set had 3 batches .* and has 2 now: pass the same data", make(), tmp_path, shorter, method=own)
    refused("the forget set had 3 batches", make(), tmp_path, loaders(), method=own)
    data = {"forget": batches(3, 6, seed=1), "retain": Generated(batches(5, 6, seed=2))}
    refused("had 0 generators .* and has 1 now: pass the same loaders", make(), tmp_path, data, method=own)


class Generated(list):
    """Batches with a generator, as a DataLoader has one."""

    generator = torch.Generator()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(make(), output_dir=tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    with pytest.raises(InputError, match="checkpoints_total_limit"):
        run(make(), output_dir=tmp_path, checkpointing_steps=2, checkpoints_total_limit=0)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("state.json", b'{"format": ', "its state.json is not as it was written"),
        ("state.json", None, "its state.json is missing"),
        ("SHA256SUMS", b"junk", "its SHA256SUMS cannot be read"),
        ("SHA256SUMS", None, "its SHA256SUMS is missing"),
        ("model.safetensors", b"junk", "its model.safetensors is not as it was written"),
        ("model.safetensors", None, "its model.safetensors is missing"),
        ("optimizer.safetensors", b"", "its optimizer.safetensors is not as it was written"),
        ("mask.safetensors", b"junk", "its mask.safetensors is not as it was written"),
        ("mask.safetensors", None, "its mask.safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(file, content, words, tmp_path) -> None:
    checkpoint = interrupted(tmp_path)
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    message = f"checkpoint-12 is damaged: .*{words}.*; resume from an earlier one"
    refused(message, make(seed=4), tmp_path, resume=checkpoint, method=method())


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path) -> None:
    checkpoint = interrupted(tmp_path)
    (checkpoint / "SHA256SUMS").unlink()
    (checkpoint / "state.json").write_text('{"format": "unlearn_ext.checkpoint.6", "iteration": 12}')
    refused("is not a checkpoint of this version: start the run again", make(seed=4), tmp_path, method=method())


def test_labels_are_checked_after_resuming_as_well(tmp_path) -> None:
    interrupted(tmp_path, {"iterations": 30}, evaluate=lambda model, step: step == 13, evaluate_every=1)
    retain = batches(5, 6, seed=2)
    retain[4][1][3] = 4
    with pytest.raises(InputError, match="label 4 is outside the model's 4 classes"):
        run(
            make(),
            {"forget": batches(3, 6, seed=1), "retain": retain},
            {"iterations": 30},
            output_dir=tmp_path,
            resume_from_checkpoint="latest",
        )


KILLED = Path(__file__).parent / "programs" / "run_to_be_killed.py"


@pytest.mark.process
def test_another_task_is_refused(tmp_path) -> None:
    wrong = "random_label:iterations=4,lr=0.01"
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    Unlearner(make(), Classification(seed=1), wrong).run(**data, output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(InputError, match=r"was written with task\.seed=1 and this run has 2"):
        again = Unlearner(make(), Classification(seed=2), wrong)
        again.run(**data, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2")


@pytest.mark.process
def test_kill_and_resume(tmp_path) -> None:
    """A killed process leaves whole checkpoints only, and the run continues from the newest."""
    command = [sys.executable, str(KILLED), str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-15").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    stderr = process.communicate()[1].decode()
    assert (tmp_path / "checkpoint-15").exists(), stderr
    latest = max(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    stop = latest + 12

    torch.manual_seed(7)
    whole = make(dropout=0.3)
    run(whole, loaders(), {"iterations": 4000}, evaluate=lambda m, step: step == stop, evaluate_every=1)
    resumed = make(seed=9, dropout=0.3)
    result = run(
        resumed,
        loaders(),
        {"iterations": 4000},
        output_dir=tmp_path,
        resume_from_checkpoint="latest",
        evaluate=lambda m, step: step == stop,
        evaluate_every=1,
    )
    assert identical(weights(whole), weights(resumed))
    assert [entry["iteration"] for entry in result.history] == list(range(stop))
