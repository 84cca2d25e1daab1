"""What a small network does alone and on several ranks, for test_ranks.py."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import runs
from helpers.models import make
from helpers.normed import Normed, around
from helpers.rank_runs import Network, batches, go, network, rank, ranks, samples, sets, weights
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from unlearn_ext import SaliencyMask, Unlearner, UnlearnOptimizer
from unlearn_ext.distributed.shards import full, local, part_like
from unlearn_ext.distributed.wrappers import trainable
from unlearn_ext.errors import Terminated, UnlearnError
from unlearn_ext.methods import SFRon, find, parse
from unlearn_ext.saliency import FisherDiagonal
from unlearn_ext.saliency.protection import protected_count, protected_hashes
from unlearn_ext.tasks import Classification

Case = Callable[..., dict[str, Any]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@case
def sequential(wrapper: str | None, directory: Path) -> dict[str, Any]:
    return go(wrapper)


@case
def joint(wrapper: str | None, directory: Path) -> dict[str, Any]:
    return go(wrapper, changes={"update": "joint", "rule": "momentum", "momentum": 0.9})


@case
def joint_in_buckets(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Gradients that are views of DistributedDataParallel's buckets, which every backward pass writes anew."""
    model = network(wrapper)
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model.module, gradient_as_bucket_view=True)
    return go(wrapper, model=model, changes={"update": "joint", "rule": "momentum", "momentum": 0.9})


@case
def two_states(wrapper: str | None, directory: Path) -> dict[str, Any]:
    changes = {"dual_state": True, "forget_rule": "adam", "forget_lr": 0.003, "rule": "momentum", "momentum": 0.5}
    return go(wrapper, changes={**changes, "param_groups": {"head.*": {"lr": 0.002}}})


@case
def fraction(wrapper: str | None, directory: Path) -> dict[str, Any]:
    return go(wrapper, changes={"gamma": None, "mask_fraction": 0.3, "fisher_max_norm": 0.02})


@case
def accumulated(wrapper: str | None, directory: Path) -> dict[str, Any]:
    return go(wrapper, arguments={"gradient_accumulation_steps": 2, "ema_decay": 0.8})


@case
def methods(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Those that take more than SFR-on does."""
    settings = {"rule": "momentum", "momentum": 0.5, "lr": 0.05, "iterations": 6}
    found: dict[str, Any] = {}
    torch.manual_seed(1)
    random_model = Network().double()
    for name, changes in (
        ("gradient_ascent", {}),
        ("projected", {"max_norm": 0.5}),
        ("salun", {"mask_fraction": 0.4}),
        ("scrub", {"epochs": 2, "msteps": 1}),
        ("bad_teacher", {"random_model": random_model}),
        ("nabla_tau", {}),
        ("ug_clu", {"gamma": 0.5}),
    ):
        method, data, model = parse(name, **{**settings, **changes}), sets(), network(wrapper)
        data |= {"learn": batches(2, 7, 6)} if method.learns else {}
        data |= {"unseen": batches(2, 3, 7)} if method.needs_unseen else {}
        own = directory / f"methods-{name}-{wrapper}-{ranks()}"
        try:
            result = Unlearner(model, Classification(), method).run(**data, output_dir=own, checkpointing_steps=4)
        except UnlearnError as error:
            found[name] = {"error": str(error)}
        else:
            found[name] = {"weights": weights(model), "history": result.history, "protection": result.protection}
    if "weights" in found["scrub"]:
        model = network(wrapper)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # its teacher is not the model that resumes
        resume = directory / f"methods-scrub-{wrapper}-{ranks()}" / "checkpoint-4"
        method = parse("scrub", **settings, epochs=2, msteps=1)
        Unlearner(model, Classification(), method).run(**sets(), resume_from_checkpoint=resume)
        found["scrub resumed"] = weights(model)
    return found


@case
def protected(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """With a mask from a file of one process."""
    file = directory / "given.safetensors"
    shapes = {name: p.shape for name, p in trainable(network(None)).items()}
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
    if rank() == 0:
        SaliencyMask.from_dict(masks).save(file)
    if ranks() > 1:
        torch.distributed.barrier()
    mask = SaliencyMask.load(file)
    before = weights(network(None))
    found = go(wrapper, changes={"mask": mask, "gamma": None, "mask_scope": "all", "protect": True})
    for name, bits in masks.items():
        kept = zip(bits.flatten().tolist(), before[name], found["weights"][name], strict=True)
        assert all(free or a == b for free, a, b in kept), name
    return found


@case
def one_sample(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Batches smaller than the world."""
    return go(wrapper, data={"forget": batches(3, 1, 1), "retain": batches(4, 3, 2)})


@case
def resumed(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """From a checkpoint of as many ranks."""
    own = directory / f"run-{wrapper}-{ranks()}"
    whole = go(wrapper, output_dir=own, checkpointing_steps=2, arguments={"ema_decay": 0.9})
    again = {"output_dir": own, "resume_from_checkpoint": own / "checkpoint-4", "arguments": {"ema_decay": 0.9}}
    found = go(wrapper, **again)
    assert found["counts"] == whole["counts"] and len(found["history"]) == len(whole["history"])
    for key in ("weights", "ema"):  # DDP groups its buckets anew after the first pass: other sums, other last bits
        for name, values in whole[key].items():
            torch.testing.assert_close(
                *(torch.tensor(v, dtype=torch.float64) for v in (found[key][name], values)), rtol=1e-12, atol=1e-12
            )
    if rank() == 0:
        lines = [json.loads(line) for line in (own / "history.jsonl").read_text().splitlines()]
        assert lines == found["history"]
    return found


@case
def evaluated(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Only the first rank says stop."""
    found = go(wrapper, evaluate=lambda model, done: rank() == 0 and done == 4, evaluate_every=2)
    assert len(found["history"]) == 4
    return found


@case
def not_finite(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """One sample, which is the last rank's."""
    data = sets(8)
    data["forget"][0][0][-1, 2] = torch.nan
    model = network(wrapper)
    before = weights(model)
    try:
        go(wrapper, model=model, data=data, changes={"gamma": None})
    except UnlearnError as error:
        assert weights(model) == before
        return {"error": f"{type(error).__name__}: {error}"}
    raise AssertionError("nothing was noticed")


@case
def shuffled(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Loaders without generators of their own, and ranks whose global generators differ."""
    found = {}
    for name, seed in (("forget", 1), ("retain", 2)):
        data = list(zip(*samples(11, seed), strict=True))
        found[name] = DataLoader(data, batch_size=4, shuffle=True)
    torch.manual_seed(7 + rank())
    model = network(wrapper)
    torch.manual_seed(7 + rank())
    return go(wrapper, model=model, data=found)


@case
def protected_bits(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Hashes of what is protected, the same however it is cut; and a bit that a single rank moves is noticed."""
    model = network(wrapper)
    named = list(trainable(model).items())
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in named}
    bits = SaliencyMask.from_dict(masks).bind(named)
    weights = [p for _, p in named]
    found = {"hashes": protected_hashes(weights, bits), "count": protected_count(weights, bits)}
    assert found["count"] == sum(int((~mask).sum()) for mask in masks.values())
    masks["first.weight"][:] = False
    bits = SaliencyMask.from_dict(masks).bind(named)
    before = protected_hashes(weights, bits)
    moved = [name for name, _ in named].index("first.weight")
    own = local(weights[moved])
    if own.numel():
        with torch.no_grad():
            own.view(-1)[-1] += 1
    after = protected_hashes(weights, bits)
    assert [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [moved]
    return found


@case
def ties(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Equal ratios are kept in the order of the tensors, then in logical order; none, some and all of them."""
    model = network(wrapper).float()
    found: dict[str, Any] = {}
    diagonals = [FisherDiagonal(model, Classification()) for _ in range(2)]
    for number, diagonal in enumerate(diagonals):
        diagonal.count, diagonal.seen = 1, set(diagonal.sums)
        for i, total in enumerate(diagonal.sums.values()):
            generator = torch.Generator().manual_seed(10 * number + i)
            values = torch.randint(0, 3, total.shape, generator=generator).float()
            local(total).copy_(part_like(values, total))
    for part in (0.0, 0.1, 0.35, 0.5, 0.8, 1.0):
        mask = SaliencyMask.from_fisher(*diagonals, mask_fraction=part)
        found[str(part)] = {name: bits.flatten().tolist() for name, bits in mask.unpack().items()}
    return found


@case
def fisher(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """The diagonal, as released and, where weights are whole, exact."""
    found: dict[str, Any] = {}
    for per_sample in (False, True):
        try:
            diagonal = FisherDiagonal(network(wrapper), Classification(), per_sample=per_sample, chunk=2)
        except UnlearnError as error:
            found["error"] = str(error)
            continue
        for seed in (1, 2):
            diagonal.measure(batches(3, 5, seed))
        means = {name: full(value).flatten().tolist() for name, value in diagonal.means().items()}
        found[f"per sample {per_sample}"] = {"weights": means, "count": diagonal.count}
    return found


@case
def optimizer_alone(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """The README's loop, the state saved and loaded into a new optimizer in the middle."""
    model = network(wrapper)
    settings = {"rule": "adam", "lr": 0.01, "max_norm": 0.05, "retain_max_norm": 0.1, "slow_rate": 0.5}
    optimizer = UnlearnOptimizer(model.named_parameters(), **settings)
    data = sets(4)
    part = slice(rank() * 4 // ranks(), (rank() + 1) * 4 // ranks())
    for i, ((x, y), (u, v)) in enumerate(zip(data["forget"], data["retain"], strict=False)):
        (-nn.functional.cross_entropy(model(x[part]), y[part])).backward()
        optimizer.forget_step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(u[part]), v[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i == 1:
            state = optimizer.state_dict()
            optimizer = UnlearnOptimizer(model.named_parameters(), **settings)
            optimizer.load_state_dict(state)
    return {"weights": weights(model), "clip": float(optimizer.last_clip)}


@case
def own_samples(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """Loaders that give each rank every W-th sample; alone, the same samples in one batch."""
    found = {}
    for name, seed in (("forget", 1), ("retain", 2)):
        data = list(zip(*samples(16, seed), strict=True))
        if ranks() > 1:
            sampler = DistributedSampler(data, shuffle=False)
            found[name] = DataLoader(data, batch_size=8 // ranks(), sampler=sampler)
        else:
            found[name] = DataLoader(data, batch_size=8)
    if ranks() > 1:
        try:
            go(wrapper, data=found)
        except UnlearnError as error:
            assert "set split_batches=False" in str(error)
        else:
            raise AssertionError("taken for whole batches")
    return go(wrapper, data=found, arguments={"split_batches": False})


def duplicates(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """A sample that one rank is to forget and another to keep."""
    forget, retain = batches(2, 4, 1 + 10 * rank()), batches(2, 4, 2 + 10 * rank())
    if rank() == ranks() - 1:
        retain[0][0][0] = batches(2, 4, 1)[1][0][2]
    try:
        go(wrapper, data={"forget": forget, "retain": retain}, arguments={"split_batches": False})
    except UnlearnError as error:
        told = str(error)
        return {"error": told if told.startswith("rank") or ranks() == 1 else f"rank {rank()}: {told}"}
    raise AssertionError("nothing was noticed")


def unwrapped_model(wrapper: str | None, directory: Path) -> dict[str, Any]:
    try:
        go(None)
    except UnlearnError as error:
        return {"error": str(error)}
    raise AssertionError("nothing was noticed")


def accelerated(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """What ``accelerator.prepare`` makes of model and loaders."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data = {}
    for name, seed in (("forget", 1), ("retain", 2)):
        loader = DataLoader(list(zip(*samples(16, seed), strict=True)), batch_size=8 // ranks())
        data[name] = accelerator.prepare(loader)
    model = accelerator.prepare(network(None))
    assert isinstance(model, nn.parallel.DistributedDataParallel) == (ranks() > 1)
    return go(None, model=model, data=data, arguments={"split_batches": False})


def other_teachers(wrapper: str | None, directory: Path) -> dict[str, Any]:
    torch.manual_seed(rank())
    own = Network().double()
    try:
        Unlearner(network("ddp"), Classification(), find("bad_teacher")(random_model=own))
    except UnlearnError as error:
        return {"error": str(error)}
    raise AssertionError("nothing was noticed")


def partly_sharded(wrapper: str | None, directory: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = network(None)
    fully_shard(model.first)
    try:
        go(None, model=model)
    except UnlearnError as error:
        return {"error": str(error)}
    raise AssertionError("nothing was noticed")


def uneven(wrapper: str | None, directory: Path) -> dict[str, Any]:
    data = {"forget": batches(2 + rank(), 4, 1), "retain": batches(2, 4, 2)}
    try:
        go(wrapper, data=data, arguments={"split_batches": False})
    except UnlearnError as error:
        return {"error": str(error)}
    raise AssertionError("nothing was noticed")


def sampled_before(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """A pass without a backward one leaves fully_shard's weights whole."""
    model = network("fsdp")
    with torch.no_grad():
        model(samples(3, 5)[0])
    diagonal = FisherDiagonal(model, Classification()).measure(batches(3, 5, 1))
    return {name: full(value).flatten().tolist() for name, value in diagonal.means().items()}


def continued(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """From checkpoints of another number of ranks, as they lie in ``directory``, with both wrappers."""
    found = {}
    for run in sorted(directory.glob("run-*")):
        if not run.name.endswith(f"-{ranks()}"):
            for way in ("ddp", "fsdp"):
                again = {"resume_from_checkpoint": run / "checkpoint-4", "arguments": {"ema_decay": 0.9}}
                found[f"{run.name} {way}"] = {k: v for k, v in go(way, **again).items() if k in ("weights", "ema")}
    return found


def lost(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """The last rank ends in the middle of the run."""

    def evaluate(model: nn.Module, done: int) -> None:
        if rank() == ranks() - 1 and done == 5:
            os._exit(7)

    try:
        go(wrapper, output_dir=directory / "lost", checkpointing_steps=2, evaluate=evaluate, evaluate_every=1)
    except UnlearnError as error:
        (directory / f"lost-{rank()}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    raise AssertionError("nothing was noticed")


def signalled(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """The last rank gets SIGTERM in an iteration."""

    def send(model: nn.Module, done: int) -> None:
        if rank() == ranks() - 1 and done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    model = nn.parallel.DistributedDataParallel(make())
    try:
        runs.run(model, output_dir=directory / "signalled", checkpointing_steps=4, evaluate=send, evaluate_every=1)
    except Terminated as stopped:
        return {"code": stopped.exit_code, "iteration": stopped.iteration, "checkpoint": str(stopped.checkpoint)}
    raise AssertionError("nothing was noticed")


def statistics(wrapper: str | None, directory: Path) -> dict[str, Any]:
    """The first rank's running means after a run whose retain batches alone move them, and how many did."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, wrap in (("ddp", nn.parallel.DistributedDataParallel), ("fsdp", fully_shard)):
        model = Normed()
        method = SFRon(iterations=6, lr=1e-3, gamma=None, batch_norm_statistics="retain")
        Unlearner(wrap(model), Classification(), method).run(around(50.0, 2, seed=1), around(-2.0, 3, seed=2))
        told = [(model.norm.running_mean.tolist(), int(model.norm.num_batches_tracked))]
        torch.distributed.broadcast_object_list(told)
        found[name] = told[0]
    return found


# Not done by all wrappers in one launch.
OTHERS = {f.__name__: f for f in (duplicates, unwrapped_model, accelerated, lost, partly_sharded, uneven)}
OTHERS |= {f.__name__: f for f in (other_teachers, signalled, statistics)}
OTHERS |= {f.__name__: f for f in (sampled_before, continued)}


def main(directory: Path, *wanted: str) -> None:
    """Every case with the wrappers that are named, and others by their names; the first rank writes what all of them
    found to ``directory/<case>-<wrapper>-<ranks>.json``."""
    torch.distributed.init_process_group("gloo")
    jobs = [(name, CASES[name], wrapper) for wrapper in wanted if wrapper not in OTHERS for name in CASES]
    jobs += [(name, OTHERS[name], "ddp") for name in wanted if name in OTHERS]
    for name, function, wrapper in jobs:
        found = function(wrapper, directory)
        told: list[Any] = [None] * ranks()
        torch.distributed.all_gather_object(told, found)
        assert all(other == told[0] for other in told), f"{name}: the ranks differ"
        if rank() == 0:
            (directory / f"{name}-{wrapper}-{ranks()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
