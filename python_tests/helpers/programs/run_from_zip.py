"""A run of the package from a zip file; prints its backend and a weight."""

import sys

sys.path.insert(0, sys.argv[1])

import torch

import unlearn_ext
from unlearn_ext.methods import parse
from unlearn_ext.tasks import Classification

assert unlearn_ext.__file__.startswith(sys.argv[1])
torch.manual_seed(0)
batches = [(torch.randn(8, 4), torch.arange(8) % 2)]
model = torch.nn.Linear(4, 2)
method = parse("finetune:iterations=2,lr=0.1")
result = unlearn_ext.Unlearner(model, Classification(), method).run(None, batches)
print(result.backend, float(model.weight.sum()))
