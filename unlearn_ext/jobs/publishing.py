"""The end of a run: what goes into the output folder, in an order that a kill at any moment leaves mendable."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..run.result import Progress, Result
from ..utils.clock import timed
from ..utils.files import atomic_path
from .output import NOT_YET, is_waiting, move_output, recorded_verdict, write_output
from .plan import ForgetPlan
from .preset import task_settings
from .unmet import judged_warnings
from .work import WorkFolder

__all__ = ["Record", "finish_earlier", "how_to_go_on", "publish"]

Record = Callable[[dict[str, Any], bool], Any]  # takes a result, and whether all is in it


def publish(
    plan: ForgetPlan,
    result: Result,
    records: Path,
    weights: Mapping[str, Tensor] | None,
    record: Record,
    seconds: dict[str, float],
    progress: Progress,
) -> dict[str, Any]:
    """Writes everything and returns the result.

    The first record comes before the model is whole, so that no whole model lacks it; the pictures too, unless making
    them fails.

    Args:
        records: the folder in the output folder for all that is not the model.
        weights: the denoiser's, by name, where it holds but a part of them.
        record: called with the result and whether all is in it.
        seconds: by stage; those of judging are added.
    """
    if result.mask is not None:
        result.mask.save(records / "mask.safetensors")
    if (plan.work.path / "history.jsonl").is_file():
        with atomic_path(records / "history.jsonl") as partial:
            shutil.copyfile(plan.work.path / "history.jsonl", partial)
    output = plan.options.output_dir
    record(_report(plan, result, NOT_YET, None, seconds), False)
    try:
        try:
            plan.pictures.write_grid(records / "before-after.png")
        finally:  # whatever goes wrong with the pictures, the model is whole
            write_output(plan.pretrained, output, weights)
        with timed(seconds, "judging") if plan.pictures.judge else contextlib.nullcontext():
            verdict = plan.pictures.verdict()
        with timed(seconds, "FID") if plan.pictures.fid else contextlib.nullcontext():
            fid = plan.pictures.distances(lambda when, done, total: progress(f"FID {when}", done, total))
        report = _report(plan, result, verdict, fid, seconds)
        record(report, True)
    finally:
        if is_waiting(output):
            _finish(plan)
    return report


def _finish(plan: ForgetPlan) -> None:
    """Moves a whole result to its place; what nobody should publish goes first, for after it no run would remove it."""
    if not plan.options.keep_work:
        plan.work.clear()
    move_output(plan.options.output_dir)


def finish_earlier(plan: ForgetPlan) -> None:
    """Moves the result of a run that was killed when it was whole and not in its place.

    Raises:
        InputError: there was one, so that there is nothing to run.
    """
    output = plan.options.output_dir
    if not is_waiting(output):
        return
    if not plan.options.keep_work:
        WorkFolder(output).clear()  # that run's, whatever --work-dir is now
    _finish(plan)
    raise InputError(
        f"--output-dir: {output} was an earlier run's, cut off at its very end, and its model is whole now: use it, or "
        "choose an empty folder to run again"
    )


def how_to_go_on(plan: ForgetPlan) -> str:
    """After a run was ended from outside."""
    output = plan.options.output_dir
    if is_waiting(output):
        return f"the model is whole; the same command moves it to its place in {output}"
    if any((output / name).exists() for name in ("model_index.json", plan.pretrained.denoiser_folder or "config.json")):
        judged = ", and its pictures were not judged" if recorded_verdict(output) == NOT_YET else ""
        return f"the model in {output} is whole{judged}"
    return plan.work.how_to_go_on()


def _report(
    plan: ForgetPlan,
    result: Result,
    verdict: dict[str, Any] | str,
    fid: dict[str, Any] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    mask, judge = result.mask, plan.pictures.judge
    judged = {} if judge is None else judged_warnings(verdict, judge.model.config.num_labels)
    return {
        "forgotten": [plan.names[i] for i in plan.pictures.forgotten],
        "verdict": verdict,
        "warnings": {**result.warnings, **judged},
        "fid": fid,
        "weights": {"saved": plan.options.save_weights, "ema_decay": plan.ema_decay},
        "trained_weights": plan.trained_count,
        "null_class": None if plan.pretrained.classes is None else plan.pretrained.classes.null_label,
        "retained_classes": {"sampled": len(plan.pictures.retained), "in_data": plan.retained_count},
        "mapping": [row._asdict() for row in plan.data.mapping],
        "unreadable": list(plan.data.unreadable.values()),
        "ignored": plan.data.ignored,
        "enlarged": len(plan.data.enlarged),
        "data_sha256": plan.data.sha256,
        "data_sha256_covers": plan.data.sha256_covers,
        "preprocessing": plan.data.preprocessing,
        "preset": plan.preset,
        "published": plan.domain["published"],
        "method": {"name": plan.method.name, "batch_size": plan.batch_size, **plan.method.settings()},
        "task": task_settings(plan),
        "left_out": plan.left_out(),
        "notes": plan.notes,
        "sampling": plan.pictures.protocol,
        "mask_density": mask.density if mask else None,
        "protection": result.protection,
        "counts": result.counts,
        "backend": result.backend,
        "seconds": seconds,
        "options": plan.options.settings(),
    }
