"""A denoiser on several ranks, each a process of ``torchrun``: replicated, or cut into parts."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor, nn

from ..distributed.shards import full, is_sharded
from ..distributed.wrappers import own_names, reshard
from ..errors import InputError

__all__ = ["PARALLEL", "gather_weights", "shard", "start_ranks", "world_size", "wrap"]

PARALLEL = ("ddp", "fsdp")
_BLOCKS = ("transformer_blocks", "down_blocks", "mid_block", "up_blocks")
# The others wait while the first one encodes a large data set. A rank that is gone is torchrun's to notice.
_PATIENCE = timedelta(hours=12)


def start_ranks(device: str) -> str:
    """Joins the ranks that ``torchrun`` has started, if it has, and says this one's device.

    Raises:
        InputError: ``device`` names one GPU for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    place = torch.device(device)
    if place.type == "cuda":
        if place.index is not None:
            raise InputError(f"--device {device} is one GPU for all ranks: say --device cuda, and each takes its own")
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if place.index >= torch.cuda.device_count():
            raise InputError(
                f"rank {os.environ['RANK']} finds no GPU of its own, only {torch.cuda.device_count()} are here: start "
                "as many ranks as there are GPUs"
            )
        torch.cuda.set_device(place)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)
    return str(place)


def world_size() -> int:
    """How many there are."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def wrap(model: nn.Module, parallel: str) -> nn.Module:
    """The model over all ranks: in DistributedDataParallel (``ddp``), or cut by :func:`shard` (``fsdp``), in place."""
    if parallel == "ddp":
        device = next(model.parameters()).device
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)
    return shard(model)


def shard(model: nn.Module) -> nn.Module:
    """``fully_shard`` of each block of a DiT or UNet, and of what is left; of a DiT's embedders by themselves, for it
    calls the first block's from outside the block, and of those that are tied together, for they are cut as one."""
    from torch.distributed.fsdp import fully_shard

    for embedders in _embedders(model):
        fully_shard(embedders)
    for name in _BLOCKS:
        part = getattr(model, name, None)
        for block in part if isinstance(part, nn.ModuleList) else [part] if part is not None else ():
            fully_shard(block)
    return fully_shard(model)


def gather_weights(model: nn.Module) -> Mapping[str, Tensor] | None:
    """All parameters by name, whole, on the CPU of the first rank, and nothing by name on the others; None where they
    are whole already."""
    reshard(model)
    if not any(map(is_sharded, model.parameters())):
        return None
    first = torch.distributed.get_rank() == 0
    gathered: dict[int, Tensor | None] = {}
    weights: dict[str, Tensor] = {}
    for name, p in own_names(model.named_parameters(remove_duplicate=False)).items():
        if id(p) not in gathered:
            whole = full(p)
            gathered[id(p)] = whole.cpu() if first else None
        if first:
            weights[name] = gathered[id(p)]
    return weights


def _embedders(model: nn.Module) -> list[list[nn.Module]]:
    """A DiT's timestep and label embedders, one in each block; together where the blocks share their weights."""
    blocks = getattr(model, "transformer_blocks", ())
    embedders = [block.norm1.emb for block in blocks if hasattr(getattr(block, "norm1", None), "emb")]
    first = {id(next(embedder.parameters(), None)) for embedder in embedders}
    return [embedders] if len(first) == 1 else [[embedder] for embedder in embedders]
