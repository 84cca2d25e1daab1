"""Runs of small models, alone or by several ranks, for test_ranks.py."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from helpers import shared_digits
from safetensors.torch import save_file
from torch import Tensor, nn

from unlearn_ext import Unlearner
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.distributed.shards import full
from unlearn_ext.distributed.wrappers import unwrapped
from unlearn_ext.methods import SFRon
from unlearn_ext.saliency import FisherDiagonal
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification, Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}
RULES = {
    "adamw": {"rule": "adamw", "lr": 1e-3, "weight_decay": 0.01},
    "momentum": {"rule": "momentum", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
}
# All pairs and as many iterations as the README's figures are of, or a choice of them.
ALL = os.environ.get("UNLEARN_EXT_ALL_RANKS") == "1"
SETTINGS: dict[str, Any] = {
    "iterations": 50 if ALL else 10,
    "forget_alpha": 0.5,
    "lambd": 0.5,
    "adaptive_eps": 1e-8,
    "max_norm": 1.0,
    "retain_max_norm": 5.0,
    "slow_rate": 0.8,
    "fisher_batches": 3,
}


@cache
def all_digits() -> tuple[dict[int, Tensor], Tensor]:
    """Pictures by size, and labels."""
    data = shared_digits.digits()
    return {size: data.pixels(size) for _, size in MODELS.values()}, torch.as_tensor(data.labels)


def digits(count: int, seed: int, dtype: torch.dtype, size: int, forget: bool) -> tuple[Tensor, Tensor]:
    """Real digits: threes, or all but threes."""
    pixels, labels = all_digits()
    chosen = torch.nonzero((labels == 3) == forget).flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:count]]
    return pixels[size][chosen].to(dtype), labels[chosen]


def resnet(dtype: torch.dtype) -> tuple[nn.Module, Task]:
    """BatchNorm with statistics of its own, that stay as they are."""
    model = SmallResNet(widths=(4, 8, 8), seed=0).to(dtype)
    with torch.no_grad():
        model.train()(digits(64, 9, dtype, 28, forget=False)[0])
    return model, Classification()


def dit(dtype: torch.dtype) -> tuple[nn.Module, Task]:
    from unlearn_ext.demo.diffusion import networks, weights
    from unlearn_ext.models.weights import tie_embeddings

    model = weights.load("dit").network.model.to(dtype)
    tie_embeddings(model)
    return model, ClassConditionalDiffusion(networks.noise_scheduler(), null_label=networks.NULL_LABEL, seed=5)


MODELS = {"resnet": (resnet, 28), "dit": (dit, 16)}


def sets(model: str, dtype: torch.dtype, batch: int, batches: int = 6) -> dict[str, list[Any]]:
    """Batches for ``run``; the last of each set has one sample less."""
    found = {}
    for name, seed in (("forget", 1), ("retain", 2)):
        images, labels = digits(batch * batches - 1, seed, dtype, MODELS[model][1], forget=name == "forget")
        pairs = zip(images.split(batch), labels.split(batch), strict=True)
        keys = ("pixel_values", "labels")
        found[name] = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    return found


def wrap(model: nn.Module, wrapper: str | None) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        if hasattr(model, "transformer_blocks"):
            fully_shard([block.norm1.emb for block in model.transformer_blocks])  # tied: one group
        for block in getattr(model, "transformer_blocks", None) or getattr(model, "stages", ()):
            fully_shard(block)
        fully_shard(model)
    return model


def in_chunks(model: nn.Module, chunks: int) -> None:
    """The same function, of which every pass works on so many parts of the batch in turn: sums are grouped anew."""
    forward = model.forward

    def chunked(*arguments: Any, **named: Any) -> Any:
        count = arguments[0].shape[0]
        outputs = []
        for part in torch.arange(count).tensor_split(min(chunks, count)):
            take = slice(int(part[0]), int(part[-1]) + 1)
            own = [x[take] if isinstance(x, Tensor) else x for x in arguments]
            outputs.append(forward(*own, **{k: x[take] if isinstance(x, Tensor) else x for k, x in named.items()}))
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return type(outputs[0])(sample=torch.cat([output.sample for output in outputs]))

    model.forward = chunked


def state(model: nn.Module) -> dict[str, Tensor]:
    own = {name: full(p).clone() for name, p in unwrapped(model).named_parameters()}
    return {name: value.contiguous() for name, value in own.items()}


def run(
    model: str,
    rule: str,
    dtype: str = "float64",
    *,
    wrapper: str | None = None,
    chunks: int | None = None,
    output: str | None = None,
    batch: int = 6,
    settings: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Weights after a run, by name, the mask, and the history; the first rank writes them to ``output``."""
    kind = DTYPES[dtype]
    network, task = MODELS[model][0](kind)
    if chunks is not None:
        in_chunks(network, chunks)
    network = wrap(network, wrapper)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    method = SFRon(**{**SETTINGS, **RULES[rule], **(settings or {})})
    unlearner = Unlearner(network, task, method)
    result = unlearner.run(**sets(model, kind, batch), **(arguments or {}))
    found = state(network)
    if result.mask is not None:
        found |= {f"mask.{name}": bits for name, bits in result.mask.unpack().items()}
    losses = [
        [entry["forget_loss"], entry["retain_loss"], entry["clip"], entry["largest_share"]] for entry in result.history
    ]
    found["history"] = torch.tensor(losses, dtype=torch.float64)
    if output is not None and unlearner.ranks.first:
        save_file(found, output)
    return found


def ratios(model: str, batch: int = 6) -> dict[str, Tensor]:
    """F_f / F_r of one process in float64."""
    network, task = MODELS[model][0](torch.float64)
    data = sets(model, torch.float64, batch)
    found = [
        FisherDiagonal(network, task, batches=SETTINGS["fisher_batches"]).measure(data[name]).means()
        for name in ("forget", "retain")
    ]
    return {name: (value + 1e-15) / (found[1][name] + 1e-15) for name, value in found[0].items()}


def main(jobs: list[dict[str, Any]]) -> None:
    """Every job, the keyword arguments of :func:`run`, by the ranks together."""
    torch.distributed.init_process_group("gloo")
    for job in jobs:
        run(**job)
    torch.distributed.destroy_process_group()
