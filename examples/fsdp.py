"""One model on several ranks, sharded by fully_shard: every rank passes the same loaders and takes its part.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import tempfile

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from unlearn_ext import Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification


def main(output_dir):
    torch.manual_seed(0)  # the same data and starting weights on every rank
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    centres = 3 * torch.randn(4, 20)
    labels = torch.arange(256) % 4
    points = centres[labels] + torch.randn(256, 20)
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.get_rank() % torch.cuda.device_count())
        model.cuda()
    fully_shard(model[2])
    fully_shard(model)

    def batches(chosen):
        return list(zip(points[chosen].split(32), labels[chosen].split(32), strict=True))

    method = SFRon(rule="adamw", lr=1e-3, iterations=20, max_norm=1.0, adaptive_eps=1e-2)
    unlearner = Unlearner(model, Classification(), method)
    result = unlearner.run(
        batches(labels == 0), batches(labels != 0), output_dir=output_dir, checkpointing_steps=10
    )  # any number of ranks goes on from the checkpoints
    if distributed.get_rank() == 0:
        print(f"on {distributed.get_world_size()} ranks: {result}")


if __name__ == "__main__":
    distributed.init_process_group()
    shared = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(shared)
    main(shared[0])
    distributed.destroy_process_group()
