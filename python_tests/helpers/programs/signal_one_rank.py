"""Two ranks, of which the second gets SIGTERM in an iteration; each writes what ended it."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from helpers.models import make
from helpers.runs import run
from torch import nn

from unlearn_ext.errors import Terminated

torch.distributed.init_process_group("gloo")
rank, out = torch.distributed.get_rank(), Path(sys.argv[1])


def send(model: nn.Module, step: int) -> None:
    if rank == 1 and step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


try:
    model = nn.parallel.DistributedDataParallel(make())
    run(model, output_dir=out / "run", checkpointing_steps=4, evaluate=send, evaluate_every=1)
except Terminated as stopped:
    found = {"exit_code": stopped.exit_code, "iteration": stopped.iteration, "checkpoint": str(stopped.checkpoint)}
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
