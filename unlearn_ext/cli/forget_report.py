"""What ``unlearn-ext forget`` prints: its plan, the estimate of a dry run, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .ending import end, show_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from ..jobs.estimate import Estimate
    from ..jobs.plan import ForgetPlan
    from ..jobs.space import Room

__all__ = ["planned", "show_estimate", "show_plan", "show_result"]


def show_plan(plan: ForgetPlan, console: Console) -> None:
    """Which folder is which class, and what will be used of it, before anything starts."""
    table = Table(title="What is forgotten and what is kept")
    numbered = plan.concepts is None  # a text model has prompts and no classes
    for name in ("", *(["class"] if numbered else []), "label" if numbered else "prompt", "folder", "images"):
        table.add_column(name, justify="right" if name in ("class", "images") else "left", overflow="fold")
    for row in sorted(plan.data.mapping, key=lambda row: row.index not in plan.forget_classes):
        label = plan.concepts.prompts[row.index] if plan.concepts else row.text or ""
        what = "forget" if row.index in plan.forget_classes else "keep"
        table.add_row(what, *([str(row.index)] if numbered else []), label, row.folder or "", str(row.count))
    console.print(table)
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    if plan.data.ignored:
        console.print(f"{plan.data.ignored} other files are ignored")
    if plan.concepts is not None:
        images = "the images of that prompt" if plan.concepts.replace_classes else "the forgotten images themselves"
        console.print(f"replaced by: {plan.concepts.replacement}, as predicted for {images}", soft_wrap=True)
    if type(plan.model).__name__ == "UNet2DModel":  # no file of it says so
        null = plan.pretrained.classes.null_label
        console.print("no null class" if null is None else f"the last embedding, {null}, stands for no class")
    total = sum(p.numel() for p in plan.model.parameters())
    console.print(
        f"{type(plan.model).__name__}, preset {plan.preset}: trains {plan.trained_count:,} of {total:,} weights, "
        f"{plan.method.iterations} iterations with batches of {plan.batch_size}, from {len(plan.draw.indices)} images"
    )
    fid, sampled = plan.pictures.fid, len(plan.pictures.retained)
    if sampled < plan.retained_count:
        console.print(f"of {plan.retained_count} retained classes {sampled} are sampled, evenly over their order")
    if fid is not None:
        console.print(
            f"FID: {fid.generated:,} generated against {fid.planned:,} real images, of {len(fid.classes)} retained "
            "classes"
        )


def planned(plan: ForgetPlan, estimate: Estimate, rooms: Sequence[Room]) -> dict[str, Any]:
    """Of a dry run, for its file: bytes and seconds."""
    return {
        "dry_run": True,
        "memory": estimate.memory,
        "peak_memory": estimate.peak,
        "disk": estimate.disk,
        "disks": [
            {"paths": [str(path) for path in room.paths], "needed": room.needed, "free": room.free} for room in rooms
        ],
        "seconds": estimate.seconds,
        "mapping": [row._asdict() for row in plan.data.mapping],
        "forget_classes": list(plan.forget_classes),
        "options": plan.options.settings(),
    }


def show_estimate(estimate: Estimate, rooms: Sequence[Room], console: Console) -> None:
    """A line for each stage: there may be eight of them, and parts side by side would not fit one."""
    where = "Memory" if estimate.device.type == "cpu" else "GPU memory"
    table = Table(title=f"{where}, MB (without the framework itself)")
    table.add_column("stage")
    table.add_column("all", justify="right")
    table.add_column("parts", overflow="fold")
    for stage, parts in estimate.memory.items():
        listed = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.items() if size)
        table.add_row(stage, f"{sum(parts.values()) / 1e6:.1f}", listed)
    console.print(table)
    console.print(f"peak: {estimate.peak / 1e6:.1f} MB")
    console.print("disk: " + ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in estimate.disk.items()))
    for room in rooms:
        console.print(
            f"disk of {' and '.join(room.names)}: {room.needed / 1e6:.1f} MB will be written, {room.free / 1e6:.1f} MB "
            "are free"
        )
    times = ", ".join(f"{stage.replace('_', ' ')} {seconds:.0f} s" for stage, seconds in estimate.seconds.items())
    console.print(f"time: about {sum(estimate.seconds.values()):.0f} s ({times}), from trials of single batches")


def show_result(plan: ForgetPlan, report: dict[str, Any], console: Console) -> int:
    """What became of the run, and the exit code that says so."""
    from ..models.written import OWN_FOLDER

    if report["left_out"]:
        console.print(f"left out of the model's folder: {', '.join(report['left_out'])}", soft_wrap=True)
    if report["unreadable"]:
        console.print(f"{len(report['unreadable'])} images could not be read and were left out:")
    for image in report["unreadable"]:
        console.print(f"  {image}", soft_wrap=True)
    if report["enlarged"]:
        console.print(f"{report['enlarged']} images were smaller than the model's and were enlarged")
    _show_verdict(report, console)
    if report["fid"] is not None:
        _show_fid(report["fid"], console)
    show_warnings(report["warnings"], console)
    output = plan.options.output_dir
    if plan.work.path.exists():
        console.print(f"checkpoints and latents, not to be published: {plan.work.path}", style="dim", soft_wrap=True)
    pictures = output / OWN_FOLDER / "before-after.png"
    console.print(f"model: {output}\npictures before and after: {pictures}", style="dim", soft_wrap=True)
    return end(report["warnings"])


def _show_verdict(report: dict[str, Any], console: Console) -> None:
    verdict = report["verdict"]
    if isinstance(verdict, str):
        console.print(verdict)
        return
    table = Table(title="What the classifier sees")
    for name, justify in (("label", "left"), ("before %", "right"), ("after %", "right"), ("n", "right")):
        table.add_column(name, justify=justify)
    for part in ("forgotten", "retained"):
        for label, score in verdict["before"].get(part, {}).items():
            after = verdict["after"][part][label]
            name = f"{label} (forgotten)" if part == "forgotten" else label
            table.add_row(name, f"{100 * score['accuracy']:.1f}", f"{100 * after['accuracy']:.1f}", str(after["count"]))
    console.print(table)
    console.print(
        f"{report['sampling']['samples_per_class']} pictures of each class: {_sampler(report['sampling'])}, seed "
        f"{report['sampling']['seed']}; the same noise before and after",
        style="dim",
    )


def _sampler(sampling: dict[str, Any]) -> str:
    guidance = "no guidance" if sampling["guidance"] is None else f"guidance {sampling['guidance']:g}"
    return f"{sampling['sampler']}, {sampling['steps']} steps, {guidance}"


def _show_fid(fid: dict[str, Any], console: Console) -> None:
    """The distances with their protocol, and what they must not be taken for."""
    sampling, real, generated = fid["sampling"], fid["real"], fid["generated"]
    numbers = ", ".join(
        f"{'not computed' if fid[when] is None else _rounded(fid[when])} {when}" for when in ("before", "after")
    )
    console.print(
        f"FID of {len(fid['classes'])} retained classes: {numbers} ({fid['features']} Inception features; "
        f"{generated:,} generated by {_sampler(sampling)}; {real:,} real)"
    )
    if "error" in fid:
        console.print(f"FID could not be computed: {fid['error']}")
    if min(real, generated) <= fid["features"]:
        console.print(
            f"FID is biased upward with at most {fid['features']} pictures of a kind: compare before with after only"
        )
    fewest, most = min(fid["real_by_class"]), max(fid["real_by_class"])
    if fewest != most:
        console.print(
            f"each class has as many generated pictures, but from {fewest:,} to {most:,} real ones: that raises both "
            "FIDs"
        )
    if not fid["published_weights"]:
        console.print("the weights are not those that published FIDs use: compare before with after only")


def _rounded(distance: float) -> str:
    return f"{distance:.2f}" if abs(distance) >= 1 else f"{distance:.2g}"  # of few features it may be far below 1
