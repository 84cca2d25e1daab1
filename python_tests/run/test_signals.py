"""SIGINT, SIGTERM and SIGHUP: the iteration is finished, saved, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.models import batches, make, samples
from helpers.runs import identical, run, weights
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext.errors import Interrupted, Terminated

pytestmark = pytest.mark.filterwarnings("ignore:stopped by SIG")

KINDS = {signal.SIGINT: (Interrupted, 130), signal.SIGTERM: (Terminated, 143), signal.SIGHUP: (Terminated, 129)}
PROGRAM = Path(__file__).parents[1] / "helpers" / "programs" / "endless_run.py"


class Sending(list):
    """Batches; when one of them is taken a signal comes to this process."""

    def __init__(self, data: list, number: int, at: int, times: int = 1):
        super().__init__(data)
        self.number, self.at, self.times = number, at, times
        self.taken = [0]  # a list, since looks put a loader's numbers back

    def __iter__(self):
        for batch in super().__iter__():
            self.taken[0] += 1
            if self.taken[0] == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)
            yield batch


def interrupted(number: int, at: int = 5, times: int = 1, **arguments):
    """A run in whose iteration a signal comes; the mask's pass over the data takes five batches before it."""
    data = {"forget": batches(3, 6, seed=1), "retain": Sending(batches(5, 6, seed=2), number, 5 + at, times)}
    return run(make(), data, **arguments)


@pytest.mark.parametrize("number", KINDS)
def test_the_iteration_is_finished_and_saved(number: int, tmp_path: Path) -> None:
    kind, code = KINDS[number]
    before = [signal.getsignal(number) for number in KINDS]
    with pytest.raises(kind) as caught:
        interrupted(number, output_dir=tmp_path, checkpointing_steps=4)
    assert [signal.getsignal(number) for number in KINDS] == before
    done = caught.value.iteration
    assert caught.value.exit_code == code and 0 < done < 12 and done % 4
    assert caught.value.checkpoint == tmp_path / f"checkpoint-{done}"
    assert f"stopped by {signal.Signals(number).name} after {done} of 12 iterations" in str(caught.value)
    assert f"resume_from_checkpoint='{tmp_path}/checkpoint-{done}'" in str(caught.value)
    whole, resumed = make(), make(seed=4)
    expected = run(whole)
    result = run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert identical(weights(whole), weights(resumed)) and result.history == expected.history


def test_the_limit_holds_for_what_a_signal_saves(tmp_path: Path) -> None:
    with pytest.raises(Terminated) as caught:
        interrupted(signal.SIGTERM, 7, output_dir=tmp_path, checkpointing_steps=2, checkpoints_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{caught.value.iteration}"]


def test_a_signal_in_the_last_iteration(tmp_path: Path) -> None:
    with pytest.raises(Terminated) as caught:
        run(
            make(),
            output_dir=tmp_path,
            checkpointing_steps=5,
            evaluate=lambda model, step: os.kill(os.getpid(), signal.SIGTERM) if step == 12 else None,
            evaluate_every=1,
        )
    assert caught.value.iteration == 12
    whole = make()
    run(whole)
    resumed = make(seed=4)
    assert len(run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest").history) == 12
    assert identical(weights(whole), weights(resumed))


@pytest.mark.parametrize("output", [False, True])
def test_without_checkpoints_it_says_so(output: bool, tmp_path: Path) -> None:
    with pytest.raises(Terminated, match="nothing was saved to go on from") as caught:
        interrupted(signal.SIGTERM, **({"output_dir": tmp_path} if output else {}))
    assert caught.value.checkpoint is None and not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_before_the_first_iteration_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT$") as caught:
        interrupted(signal.SIGINT, -3, output_dir=tmp_path, checkpointing_steps=4)
    assert caught.value.iteration is None and not list(tmp_path.iterdir())


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="at once"):
        interrupted(signal.SIGINT, times=2, output_dir=tmp_path, checkpointing_steps=100)
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]
    with pytest.raises(Terminated, match="go on with"):
        interrupted(signal.SIGTERM, times=2, output_dir=tmp_path, checkpointing_steps=100)


def test_an_ordinary_except_does_not_swallow_it() -> None:
    assert not issubclass(Interrupted, Exception) and issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Terminated, (Exception, KeyboardInterrupt)) and issubclass(Terminated, SystemExit)


def test_handlers_of_others_and_ignored_signals_stay(monkeypatch) -> None:
    seen = []
    before = {number: signal.getsignal(number) for number in KINDS}
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        assert len(interrupted(signal.SIGTERM).history) == 12 and seen == [signal.SIGTERM]
        assert len(interrupted(signal.SIGHUP).history) == 12
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_runs_without_handlers() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run(make())))
    thread.start()
    thread.join()
    assert len(results[0].history) == 12


def test_an_iteration_that_cannot_be_finished_ends_in_order(tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches loaders' workers too, and the loader then says that they have died."""

    class Dying(Sending):
        def __iter__(self):
            for batch in super().__iter__():
                if self.taken[0] == self.at:
                    raise RuntimeError("DataLoader worker (pid 17) exited unexpectedly")
                yield batch

    data = {"forget": batches(3, 6, seed=1), "retain": Dying(batches(5, 6, seed=2), signal.SIGINT, 10)}
    with pytest.raises(Interrupted, match="could not be finished: go on from the last checkpoint"):
        run(make(), data, output_dir=tmp_path, checkpointing_steps=2)
    data["retain"].at = 10**6
    assert len(run(make(), data, output_dir=tmp_path, resume_from_checkpoint="latest").history) == 12


class Killing(TensorDataset):
    """A sample whose loader's worker gets a signal, as all processes of a terminal do."""

    def __getitem__(self, index: int):
        if index == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


@pytest.mark.process
def test_workers_do_not_die_of_an_interrupt_that_the_run_sees_to() -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": DataLoader(Killing(*samples(24, 2)), 4, num_workers=1)}
    assert len(run(make(), data, {"iterations": 6}).history) == 6


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("number", KINDS)
def test_exit_codes_of_a_program(number: int, tmp_path: Path) -> None:
    """A supervisor sees the signal's code, and the folder is left as it should be."""
    command = [sys.executable, PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-10").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert "history.jsonl" in names and all(name.startswith(("checkpoint-", "history")) for name in names)
    assert f"stopped by {signal.Signals(number).name} after" in stderr and f"{tmp_path}/checkpoint-" in stderr
