"""All ways through all stages: checked against ours, their memory, their times in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dit import network
from benchmarks.dit.memory import peaks
from benchmarks.dit.ours import Ours
from benchmarks.dit.rivals import Plain, Tuned, faster_adamw
from benchmarks.dit.ways import SIDES, Bench, Passes, Way
from unlearn_ext.methods import SFRon
from unlearn_ext.profiling.timing import interleaved, interleaved_stages, quantile
from unlearn_ext.profiling.work import Work

__all__ = ["DTYPES", "IMPLEMENTATIONS", "STAGES", "Measured", "Settings", "measure"]

STAGES = ("fisher", "mask", "forget", "retain", "iteration")
# Ours first: the others are compared to it.
IMPLEMENTATIONS = (
    "ours",
    "plain",
    "tuned",
    "ours, in backward",
    "ours, per sample",
    "ours, compiled",
    "tuned, compiled",
    "passes",
)
DTYPES = ("float32", "bfloat16", "autocast")

# Shares of the way that tensors have gone, by which a way may differ from ours. A mask's bit may fall the other way
# where the ratio is gamma, and AdamW makes a step of the same length of every gradient, however small: what differs
# in the last bits may differ in sign.
_TOLERANCE = {"fisher": 1e-2, "mask": 0.1, "iteration": 0.1}
# bfloat16 has 8 bits; torch.optim keeps moments in it, ours are float32.
_COARSE = {"fisher": 0.1, "mask": 0.5, "iteration": 0.5}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        shape: of the transformer; layout: one of :data:`network.LAYOUTS`.
        dtype: one of :data:`DTYPES`: of the weights, or float32 weights under bfloat16 autocast.
        batch_size: samples in a batch. With 1 the mean gradient of a batch is that of a sample, and the exact
            per-sample Fisher can be compared.
        samples: batches in a Fisher pass, and the samples of the one batch of the exact one.
        chunk: samples that the exact one differentiates at once.
        checkpointing: gradient checkpointing, in all ways; ``torch.func`` cannot, so there is no exact Fisher then.
        compiler: torch.compile's backend.
    """

    shape: network.Shape = network.NETWORKS["dit-s-2"]
    layout: str = "diffusers"
    dtype: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 1
    samples: int = 8
    chunk: int = 8
    checkpointing: bool = False
    repeats: int = 9
    stages: Sequence[str] = STAGES
    implementations: Sequence[str] = IMPLEMENTATIONS
    compiler: str = "inductor"
    seed: int = 0


@dataclass
class Measured:
    """What was found.

    Attributes:
        weights, tensors: of the network.
        seconds: stage -> implementation -> of each repetition; Fisher: of one batch, or one sample.
        peaks: implementation -> stage -> bytes; none for what is compiled, on the CPU.
        first_seconds: implementation -> of the first call of forward and backward passes that are compiled.
        adamw: torch's implementation that ``tuned`` takes.
    """

    settings: Settings
    weights: int
    tensors: int
    adamw: str
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    first_seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def median(self, stage: str, implementation: str) -> float | None:
        values = self.seconds.get(stage, {}).get(implementation)
        return statistics.median(values) if values else None

    def rows(self) -> list[dict[str, Any]]:
        """As in the JSON document; seconds in milliseconds, memory in bytes."""
        rows = []
        for stage, ways in self.seconds.items():
            for name, values in ways.items():
                p20, p50, p80 = (1e3 * quantile(values, q) for q in (0.2, 0.5, 0.8))
                own = self.peaks.get(name, {})
                of_both = max((own[part] for part in ("forget", "retain") if part in own), default=None)
                rows.append(
                    {
                        "stage": stage,
                        "implementation": name,
                        "p20_ms": p20,
                        "p50_ms": p50,
                        "p80_ms": p80,
                        "per_second": 1e3 / p50,
                        "speedup_of_ours": p50 / (1e3 * self.median(stage, "ours")),
                        "peak_bytes": of_both if stage == "iteration" else own.get(stage),
                        "first_call_s": self.first_seconds.get(stage, {}).get(name),
                    }
                )
        return rows


def measure(settings: Settings, say: Callable[[str], None] = lambda what: None) -> Measured:
    """``say`` is told what is being done.

    Raises:
        MismatchError: a way computes something else than ours.
    """
    torch.manual_seed(settings.seed)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    with torch.device(settings.device):
        model = network.build(settings.shape, settings.layout, checkpointing=settings.checkpointing)
    nn.Module.to(model, settings.device, dtype)  # diffusers' own warns of modules that a DiT has none of
    task = network.task(model)
    method = SFRon.preset("dit-xl-2-256")
    forget, retain = (
        network.batches(task, settings.samples, settings.batch_size, forgotten, settings.device)
        for forgotten in (True, False)
    )
    half = torch.bfloat16 if settings.dtype == "autocast" else None
    bench = Bench(model, task, method, forget[0], retain[0], half)
    data = {"forget": forget, "retain": retain}
    adamw = faster_adamw(bench.parameters)
    return _Measuring(settings, bench, data, adamw, say).run()


class _Measuring:
    """One measurement under way."""

    def __init__(self, settings: Settings, bench: Bench, data: dict[str, list], adamw: dict[str, bool], say: Callable):
        self.settings, self.bench, self.data, self.adamw, self.say = settings, bench, data, adamw, say
        self.measured = Measured(
            settings, sum(p.numel() for p in bench.parameters), len(bench.parameters), next(iter(adamw))
        )
        self.compiled: Bench | None = None  # one for all that are compiled
        if any(name.endswith("compiled") for name in settings.implementations):
            torch.compiler.reset()
            self.compiled = replace(bench, model=torch.compile(bench.model, backend=settings.compiler))

    def make(self, name: str) -> Way:
        bench = self.compiled if name.endswith("compiled") else self.bench
        if name == "plain":
            return Plain(bench)
        if name == "passes":
            return Passes(bench)
        if name.startswith("tuned"):
            return Tuned(bench, self.adamw)
        chunk = self.settings.chunk if name == "ours, per sample" else None
        return Ours(bench, chunk, in_backward=name == "ours, in backward")

    def names(self, stage: str) -> list[str]:
        """Implementations that the stage has, ours first and always."""
        asked = {"ours", *self.settings.implementations}
        exact = stage == "fisher" and self.settings.batch_size == 1 and not self.settings.checkpointing
        without = set() if exact else {"ours, per sample"}
        compiled = {name for name in asked if name.endswith("compiled")}
        if stage == "mask":  # which has neither gradients nor anything to compile
            without |= compiled | {"ours, in backward", "passes"}
        if stage == "memory":
            without |= {"passes"}
        if stage == "memory" and self.bench.device.type == "cpu":  # compiled programs are not seen
            without |= compiled
        return [name for name in IMPLEMENTATIONS if name in asked - without]

    def run(self) -> Measured:
        stages = self.settings.stages
        names = self.names("memory")
        self._memory([name for name in names if not name.endswith("compiled")])
        if {"fisher", "mask"} & set(stages):
            self._fisher_and_mask()
            gc.collect()
        if {"forget", "retain", "iteration"} & set(stages):
            self._steps()
            gc.collect()
        self._memory([name for name in names if name.endswith("compiled")])  # whose first calls have been timed
        return self.measured

    def _memory(self, names: Sequence[str]) -> None:
        self.bench.model.train()
        for name in names:
            self.say(f"memory of {name}")
            self.measured.peaks[name] = peaks(self.make(name), self.data["forget"][:2])
            gc.collect()

    # --- Fisher and mask ------------------------------------------------------------------------------------

    def _fisher_and_mask(self) -> None:
        self.bench.model.eval()
        ways = {name: self.make(name) for name in self.names("fisher")}
        runs = {name: self._pass(name, way) for name, way in ways.items()}

        def reset() -> None:
            for way in ways.values():
                way.start_fisher()

        def sums(returned: Way | None) -> list[Tensor]:
            return [] if returned is None else _without_noise(returned.sums("retain"))

        self.say("checking Fisher")
        first = self._check("fisher", runs, sums, reset)
        self.measured.first_seconds["fisher"] = {name: s for name, s in first.items() if name.endswith("compiled")}
        if "fisher" in self.settings.stages:
            self.say("timing Fisher")
            seconds = interleaved(runs, self.settings.repeats, self.bench.device)
            count = self.settings.samples
            self.measured.seconds["fisher"] = {name: [s / count for s in took] for name, took in seconds.items()}
        if "mask" in self.settings.stages:
            self._mask({name: ways[name] for name in self.names("mask")})

    def _pass(self, name: str, way: Way) -> Callable[[], Way]:
        retain = self.data["retain"]
        if name == "ours, per sample":  # all samples in one batch
            retain = [{key: torch.cat([batch[key] for batch in retain]) for key in retain[0]}]

        def run() -> Way:
            way.fisher("retain", retain)
            return way

        return run

    def _mask(self, ways: dict[str, Way]) -> None:
        for way in ways.values():  # as many batches of both sides
            way.start_fisher()
            for side in SIDES:
                way.fisher(side, self.data[side][:2])

        def run(way: Way) -> Callable[[], Way]:
            def one() -> Way:
                way.mask()
                return way

            return one

        def bits(returned: Way | None) -> list[Tensor]:
            return [] if returned is None else _without_noise(returned.kept())

        runs = {name: run(way) for name, way in ways.items()}
        self.say("timing the mask")
        self._check("mask", runs, bits, lambda: None)
        self.measured.seconds["mask"] = interleaved(runs, self.settings.repeats, self.bench.device)

    # --- Steps ----------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        self.bench.model.train()
        generator = torch.Generator().manual_seed(self.settings.seed)
        masks = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in self.bench.named.items()}
        ways = {name: self.make(name) for name in self.names("iteration")}
        for way in ways.values():
            way.adopt(masks)

        def reset() -> None:
            for way in ways.values():
                way.start_steps()

        def run(way: Way) -> Callable[[], None]:
            def one() -> None:
                way.forget_step()
                way.retain_step()

            return one

        def weights(returned: Any) -> list[Tensor]:
            return _without_noise({name: p.detach() for name, p in self.bench.named.items()})

        self.say("checking iterations")
        first = self._check("iteration", {name: run(way) for name, way in ways.items()}, weights, reset)
        self.measured.first_seconds["iteration"] = {name: s for name, s in first.items() if name.endswith("compiled")}
        self.say("timing iterations")
        turns = {name: {"forget": way.forget_step, "retain": way.retain_step} for name, way in ways.items()}
        took = interleaved_stages(turns, self.settings.repeats, self.bench.device)
        for stage in ("forget", "retain", "iteration"):
            if stage in self.settings.stages:
                self.measured.seconds[stage] = {name: _stage(stage, times) for name, times in took.items()}

    def _check(
        self, stage: str, runs: dict[str, Callable], result: Callable[[Any], list[Tensor]], reset: Callable[[], None]
    ) -> dict[str, float]:
        weights = [p.detach() for p in self.bench.parameters]
        tolerance = (_TOLERANCE if self.settings.dtype == "float32" else _COARSE)[stage]
        state = weights if stage == "iteration" else []
        runs = {name: run for name, run in runs.items() if name != "passes"}  # they make nothing
        work = Work(
            stage,
            "adamw",
            torch.float32,
            self.bench.device,
            [],
            {},
            state,
            result,
            (weights, weights),
            reset,
            tolerance,
        )
        return work.check(runs)


def _stage(stage: str, times: Mapping[str, list[float]]) -> list[float]:
    if stage != "iteration":
        return times[stage]
    return [f + r for f, r in zip(times["forget"], times["retain"], strict=True)]


def _without_noise(named: Mapping[str, Tensor]) -> list[Tensor]:
    """All but the keys' biases: attention does not see them, and their gradients are rounding errors around 0."""
    return [t for name, t in named.items() if not name.endswith("to_k.bias")]
