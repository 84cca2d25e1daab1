"""Ranks without a launcher: forked from a process that has imported what they need, once for all of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from helpers.processes import environment

__all__ = ["Ended", "command", "launch"]

# What ranks would import each for itself, most of it late: at the first run of any model, by fully_shard, by diffusers.
# Nothing is imported that is not installed.
PRELOADED = ["pytest", "helpers.rank_cases", "helpers.rank_jobs", "torch._dynamo", "torch.distributed.fsdp"]
PRELOADED += ["torch.distributed.checkpoint", "accelerate", "diffusers.models.transformers", "diffusers.models.unets"]
PRELOADED += ["unlearn_ext.demo.diffusion.weights", "unlearn_ext.jobs.run"]


class Ended(NamedTuple):
    """Of a rank: its exit code and what it printed."""

    code: int
    output: str


def launch(ranks: int, function: Callable[..., object], *arguments: object, timeout: float = 1200) -> list[Ended]:
    """Calls the function in so many processes, with the variables that torchrun sets."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = True
    processes = []
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(rank)) for rank in range(ranks)]
        with mock.patch.dict(os.environ, environment()):  # when it starts, the server takes its path from there
            for rank, output in enumerate(outputs):
                variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                processes.append(context.Process(target=_rank, args=(variables, output, function, arguments)))
                processes[-1].start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in processes:
            process.kill()  # those that still wait
            process.join()
        found = zip(processes, outputs, strict=True)
        return [Ended(process.exitcode, output.read_text(errors="replace")) for process, output in found]


def _rank(variables: dict[str, object], output: Path, function: Callable[..., object], arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    with output.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again
    function(*arguments)


def command(*arguments: str) -> None:
    """``python -m unlearn_ext`` with these."""
    from unlearn_ext.cli import main

    sys.exit(main(arguments))
