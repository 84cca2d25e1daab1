"""A long run with many checkpoints in the folder argv[1]."""

import sys

import torch
from helpers.models import make
from helpers.runs import loaders, method

from unlearn_ext import Unlearner
from unlearn_ext.tasks import Classification

torch.manual_seed(7)
changes = {"iterations": 4000}
Unlearner(make(dropout=0.3), Classification(), method(**changes)).run(
    **loaders(), output_dir=sys.argv[1], checkpointing_steps=5
)
