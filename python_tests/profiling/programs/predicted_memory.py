"""What the shapes predict of a step's memory, and what it takes: two numbers a line."""

import torch

from unlearn_ext.profiling import memory

shapes, cpu = [(1000, 2000)] * 9 + [(1000,)] * 2000, torch.device("cpu")
for rule, dtype in (("adamw", torch.float32), ("momentum", torch.bfloat16)):
    print(sum(memory.predicted(shapes, rule, dtype).values()), memory.measured(shapes, rule, dtype, cpu))
