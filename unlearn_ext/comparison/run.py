"""Every method on every seed: what is missing is run, and the whole becomes one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import ops
from ..errors import InputError
from ..evaluation import RETAINED_GAP_KEYS
from ..utils.arguments import check_count
from ..utils.files import user_path, writable_directory
from .keys import machine
from .one_seed import OneSeed
from .records import Records
from .references import ROLES
from .runners import Runner
from .summary import WARNING_RULE, Runs, deviations, noise_floor, ranks, summarise
from .workload import Workload

__all__ = ["Comparison", "document"]

_LARGEST_SEED = 2**62


class Comparison:
    """Runs what is missing and gives the whole.

    Args:
        workload: what all runs have in common.
        runners: the methods, with labels that differ.
        seed, count: the first seed, and how many; each has its own split, forget set and models.
        output_dir: its ``runs`` gets one file for each finished run, from which a killed comparison goes on.
        models_dir: gets the trained models.
        fresh: trains and runs again what is there already.
        progress: called with the stage, what is done and what there is in all.
        tell: called with a sentence on what should be known, such as a damaged file.
        finished: called as ``finished(seed, label, record, found_again)`` after each run.

    Raises:
        InputError: before anything is trained or written: seeds, labels, or a method that cannot run here.
    """

    def __init__(
        self,
        workload: Workload,
        runners: Sequence[Runner],
        *,
        seed: int = 0,
        count: int = 5,
        output_dir: str | Path,
        models_dir: str | Path,
        fresh: bool = False,
        progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        tell: Callable[[str], None] = lambda sentence: None,
        finished: Callable[[int, str, dict[str, Any], bool], None] = lambda seed, label, record, found_again: None,
    ):
        check_count("--seeds", count)
        if not 0 <= seed <= _LARGEST_SEED:
            raise InputError(f"--seed: expected an integer from 0 to 2^62, got {seed}")
        self.workload, self.runners, self.fresh = workload, list(runners), fresh
        self.seeds = range(seed, seed + count)
        self._check_runners()
        self.output_dir, self.models_dir = user_path(output_dir), user_path(models_dir)
        self.progress, self.tell, self.finished = progress, tell, finished

    def _check_runners(self) -> None:
        if not self.runners:
            raise InputError("--methods: expected at least one method, got none")
        labels = [runner.label for runner in self.runners]
        for runner in self.runners:
            if labels.count(runner.label) > 1:
                raise InputError(f"--methods: {runner.label} stands there more than once: leave it out once")
            if (least := runner.least_held_out) > self.workload.unseen_size:
                what = f"{least} or more samples" if least > 1 else "samples"
                size = self.workload.held_out_size
                of_classes = "of the other classes " if self.workload.unseen_size < size else ""
                raise InputError(
                    f"{runner.label} looks at {what} {of_classes}that nobody trained on, and --held-out-size is "
                    f"{size}: set {'more' if size else 'some'} aside"
                )
            runner.check(self.workload.network(0))

    def run(self) -> dict[str, Any]:
        """Everything that ``--json`` writes."""
        workload = self.workload
        records = Records(writable_directory(self.output_dir / "runs"), self.tell, fresh=self.fresh)
        models_dir = writable_directory(self.models_dir)
        references: dict[str, list[dict[str, Any]]] = {role: [] for role in ROLES}
        runs: dict[str, list[dict[str, Any]]] = {runner.label: [] for runner in self.runners}
        for seed in self.seeds:
            one = OneSeed(workload, seed, models_dir, records, progress=self.progress, tell=self.tell)
            for role, record in one.references().items():
                references[role].append(record)
            for runner in self.runners:
                record, found_again = one.run(runner)
                runs[runner.label].append(record)
                self.finished(seed, runner.label, record, found_again)
        network = workload.network(0)
        protocol = {
            "data": workload.data,
            "data_sha256": workload.data_hash,
            **workload.protocol,
            "sizes": one.sizes,
            "seeds": list(self.seeds),
            "architecture": f"{type(network).__name__}, {sum(p.numel() for p in network.parameters())} weights",
            "dtype": "float32",
            "gap": f"mean over {', '.join(RETAINED_GAP_KEYS)} of the distance to the same seed's retrained model",
            "MIA_entropy": "fraction of the forget set that an entropy attack takes for training data",
            "RTE_share": "seconds of the unlearning over those of the same seed's retraining, which were taken when "
            "that model was trained, maybe by an earlier comparison; CPU_share: the same of processor time",
            "warnings": WARNING_RULE,
            "backend": ops.backend(workload.device),
            **machine(workload.device),
        }
        settings = {runner.label: {"origin": runner.origin, **runner.settings()} for runner in self.runners}
        return document(protocol, references, runs, settings)


def document(
    protocol: dict[str, Any], references: dict[str, Runs], runs: dict[str, Runs], settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """``methods.<name>.<metric>.mean|std|values``, ``noise_floor``, ``references`` and ``protocol``.

    Args:
        protocol: is passed on.
        references: the records of each role, one for each seed.
        runs: those of each method.
        settings: of each method.
    """
    floor = noise_floor(references["retrained"], references["retrained_again"])
    methods = {name: summarise(found) for name, found in runs.items()}
    by_mean, by_std = (
        ranks({name: found["gap"][measure] for name, found in methods.items()}) for measure in ("mean", "std")
    )
    for name, found in methods.items():
        found["rank"] = {"gap_mean": by_mean[name], "gap_std": by_std[name]}
        found["warnings"] = [asdict(one) for one in deviations(runs[name], references["retrained"], floor)]
        found["failed"] = {
            str(seed): run["failed"] for seed, run in zip(protocol["seeds"], runs[name], strict=True) if "failed" in run
        }
        found["settings"] = settings[name]
        found["runs"] = [run.get("summary") for run in runs[name]]
    return {
        "protocol": protocol,
        "noise_floor": floor,
        "references": {
            role: {**summarise(found), "training_seconds": [record["training_seconds"] for record in found]}
            for role, found in references.items()
        },
        "methods": methods,
    }
