"""A run into the folder that is named, which goes on until a signal ends it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.models import make
from helpers.runs import run

run(make(), changes={"iterations": 10**6}, output_dir=sys.argv[1], checkpointing_steps=5, checkpoints_total_limit=2)
