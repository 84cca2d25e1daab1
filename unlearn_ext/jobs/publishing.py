"""The end of a run: what goes into the output folder, in an order that a kill at any moment leaves mendable."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import InputError
from ..run.unlearner import Result
from ..utils.clock import timed
from ..utils.files import atomic_path
from .output import NOT_YET, is_waiting, move_output, recorded_verdict, write_output
from .unmet import judged_warnings
from .work import WorkFolder

if TYPE_CHECKING:
    from .job import ForgetJob

__all__ = ["finish_earlier", "how_to_go_on", "publish"]


def publish(
    job: ForgetJob,
    result: Result,
    own: Path,
    weights: Mapping[str, Tensor] | None,
    record: Callable[[dict[str, Any], bool], Any],
) -> dict[str, Any]:
    """Writes everything and returns the result.

    The first record comes before the model is whole, so that no whole model lacks it; the pictures too, unless making
    them fails.

    Args:
        own: the folder in the output folder for all that is not the model.
        weights: the denoiser's, by name, where it holds but a part of them.
        record: called with the result and whether all is in it.
    """
    if result.mask is not None:
        result.mask.save(own / "mask.safetensors")
    if (job.work.path / "history.jsonl").is_file():
        with atomic_path(own / "history.jsonl") as partial:
            shutil.copyfile(job.work.path / "history.jsonl", partial)
    output = job.options.output_dir
    record(_report(job, result, NOT_YET, None), False)
    try:
        try:
            job.pictures.write_grid(own / "before-after.png")
        finally:  # whatever goes wrong with the pictures, the model is whole
            write_output(job.pretrained, output, weights)
        with timed(job.seconds, "judging") if job.pictures.judge else contextlib.nullcontext():
            verdict = job.pictures.verdict()
        with timed(job.seconds, "FID") if job.pictures.fid else contextlib.nullcontext():
            fid = job.pictures.distances(lambda when, done, total: job.progress(f"FID {when}", done, total))
        report = _report(job, result, verdict, fid)
        record(report, True)
    finally:
        if is_waiting(output):
            _finish(job)
    return report


def _finish(job: ForgetJob) -> None:
    """Moves a whole result to its place; what nobody should publish goes first, for after it no run would remove it."""
    if not job.options.keep_work:
        job.work.clear()
    move_output(job.options.output_dir)


def finish_earlier(job: ForgetJob) -> None:
    """Moves the result of a run that was killed when it was whole and not in its place.

    Raises:
        InputError: there was one, so that there is nothing to run.
    """
    output = job.options.output_dir
    if not is_waiting(output):
        return
    if not job.options.keep_work:
        WorkFolder(output).clear()  # that run's, whatever --work-dir is now
    _finish(job)
    raise InputError(
        f"--output-dir: {output} was an earlier run's, cut off at its very end, and its model is whole now: use it, or "
        "choose an empty folder to run again"
    )


def how_to_go_on(job: ForgetJob) -> str:
    """After a run was ended from outside."""
    output = job.options.output_dir
    if is_waiting(output):
        return f"the model is whole; the same command moves it to its place in {output}"
    if any((output / name).exists() for name in ("model_index.json", job.pretrained.denoiser_folder or "config.json")):
        judged = ", and its pictures were not judged" if recorded_verdict(output) == NOT_YET else ""
        return f"the model in {output} is whole{judged}"
    return job.work.how_to_go_on()


def _report(
    job: ForgetJob, result: Result, verdict: dict[str, Any] | str, fid: dict[str, Any] | None
) -> dict[str, Any]:
    mask, judge = result.mask, job.pictures.judge
    judged = {} if judge is None else judged_warnings(verdict, judge.model.config.num_labels)
    return {
        "forgotten": [job.names[i] for i in job.pictures.forgotten],
        "verdict": verdict,
        "warnings": {**result.warnings, **judged},
        "fid": fid,
        "weights": {"saved": job.options.save_weights, "ema_decay": job.ema_decay},
        "trained_weights": job.trained_count,
        "null_class": None if job.pretrained.classes is None else job.pretrained.classes.null_label,
        "retained_classes": {"sampled": len(job.pictures.retained), "in_data": job.retained_count},
        "mapping": [row._asdict() for row in job.data.mapping],
        "unreadable": list(job.data.unreadable.values()),
        "ignored": job.data.ignored,
        "enlarged": len(job.data.enlarged),
        "data_sha256": job.data.sha256,
        "data_sha256_covers": job.data.sha256_covers,
        "preprocessing": job.data.preprocessing,
        "preset": job.preset,
        "published": job.domain["published"],
        "method": {"name": job.method.name, "batch_size": job.batch_size, **job.method.settings()},
        "task": job.task_settings,
        "left_out": job.left_out(),
        "notes": job.notes,
        "sampling": job.pictures.protocol,
        "mask_density": mask.density if mask else None,
        "protection": result.protection,
        "counts": result.counts,
        "backend": result.backend,
        "seconds": job.seconds,
        "options": job.options.settings(),
    }
