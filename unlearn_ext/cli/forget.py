"""``unlearn-ext forget``: a diffusers folder in, a diffusers folder that has forgotten out."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .device import Precision, checked_device
from .forget_report import planned, show_estimate, show_plan, show_result
from .report import check_file, plain_console, write_report

if TYPE_CHECKING:
    from ..jobs.options import ForgetOptions

__all__ = ["forget"]


class Parallel(str, Enum):
    ddp = "ddp"
    fsdp = "fsdp"


class Weights(str, Enum):
    last = "last"
    ema = "ema"


class WeightsDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class FisherStorage(str, Enum):
    device = "device"
    host = "host"
    disk = "disk"


def forget(
    pretrained_model_name_or_path: Annotated[Path, typer.Option(help="A diffusers folder on this machine.")],
    data: Annotated[Path, typer.Option(help="One folder per class, or .npz / .safetensors of images or latents.")],
    output_dir: Annotated[Path, typer.Option(help="Becomes the diffusers folder that has forgotten.")],
    forget_class: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="Index or label text, for models that are told classes; several with commas, or the option again. A "
            "number is an index; one that is also another class's text is refused: say 'index 7' or 'label 7'.",
        ),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option(
            help="JSON: folder -> index or label text; for text models folder or label -> prompt. Without it folders "
            "are the classes that they are called by, as label text or number; sorted: they are the classes in order.",
        ),
    ] = None,
    null_class: Annotated[
        bool | None,
        typer.Option(
            "--null-class/--no-null-class",
            help="Whether a UNet2DModel's last embedding stands for no class, as guidance needs; unless given, it does "
            "if the data hold exactly the others.",
        ),
    ] = None,
    forget_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="What to forget, for text models; may be given again for more."),
    ] = None,
    replace_prompt: Annotated[str | None, typer.Option(help="What to show in its place, for all of them.")] = None,
    preset: Annotated[str | None, typer.Option(help="ddpm-cifar10, dit-xl-2-256 or sd-nudity; by the model.")] = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Iterations; the preset's.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="Of each set; the preset's.")] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="The preset's.")] = None,
    forget_alpha: Annotated[float | None, typer.Option(help="Strength of forgetting; the preset's.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Fisher ratio from which weights may move; the preset's.")] = None,
    mask_fraction: Annotated[float | None, typer.Option(help="Instead: the fraction of weights that may move.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Instead: a mask of an earlier run, not measured again.")] = None,
    fisher_batches: Annotated[
        int | None, typer.Option(help="Of each set, for the mask; at most a pass over it.")
    ] = None,
    trained_weights: Annotated[
        str | None,
        typer.Option(
            help="all, attention, cross-attention, a name pattern (*.attn2.*) or a regular expression; the preset's."
        ),
    ] = None,
    tie_embeddings: Annotated[
        bool | None, typer.Option(help="Keep a DiT's embedder copies equal, as the paper's model; the preset's.")
    ] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Of the averages that are saved; the preset's.")] = None,
    save_weights: Annotated[
        Weights, typer.Option(help="The last iteration's, or moving averages over all of them.")
    ] = Weights.last,
    mixed_precision: Annotated[Precision, typer.Option(help="Autocast of forward and backward.")] = Precision.no,
    weights_dtype: Annotated[
        WeightsDtype,
        typer.Option(help="Of the trained weights in the run; bfloat16 rounds stochastically. Written as float32."),
    ] = WeightsDtype.float32,
    optimizer_in_backward: Annotated[
        bool,
        typer.Option(
            "--optimizer-in-backward",
            help="Less memory: gradients are used and freed layer by layer; clipped sides take longer.",
        ),
    ] = False,
    fisher_storage: Annotated[
        FisherStorage, typer.Option(help="Where the forget set's Fisher waits for the retain set's.")
    ] = FisherStorage.device,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of convolutions.")] = False,
    checkpointing_steps: Annotated[int | None, typer.Option(help="Iterations between checkpoints.")] = None,
    checkpoints_total_limit: Annotated[int | None, typer.Option(help="Keep the newest so many.")] = None,
    resume_from_checkpoint: Annotated[str | None, typer.Option(help="latest, or a checkpoint's folder.")] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="For what must not be published: checkpoints, and latents of the images; output_dir.work beside it."
        ),
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the work folder when the result is whole.")
    ] = False,
    classifier: Annotated[
        Path | None,
        typer.Option(
            help="A transformers image-classification folder that judges the result; exit code 3 where it still sees "
            "a forgotten class in more than half as many pictures as before."
        ),
    ] = None,
    fid_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights: FID of the retained classes.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures of each class that are judged; 16.")] = None,
    num_inference_steps: Annotated[int, typer.Option(help="Of DDIM.")] = 50,
    guidance_scale: Annotated[float | None, typer.Option(help="Of the pictures; the preset's.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="An unreadable image is an error.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it takes; write no model.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result, or a dry run's plan, here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the drawn images, noise and pictures.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    parallel: Annotated[
        Parallel, typer.Option(help="Under torchrun: each rank holds the denoiser (ddp), or a part of it (fsdp).")
    ] = Parallel.ddp,
) -> int:
    """Make a diffusion model forget a class or a concept, in diffusers' own format.

    Opens a folder of DiTPipeline, DDPM (UNet2DModel) or Stable Diffusion,
    measures which weights matter for what is to be forgotten, unlearns with
    SFR-on, and writes a folder that diffusers opens. The denoiser's weights
    are the only file that changes. unlearning/ in it holds the result, the
    pictures before and after from the same noise, the mask and the history.
    Checkpoints and latents are in a work folder, removed at the end.
    """
    from ..jobs.options import ForgetOptions
    from ..jobs.parallel import start_ranks

    options = ForgetOptions(
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        data=data,
        output_dir=output_dir,
        forget_class=forget_class,
        class_map=class_map,
        null_class=null_class,
        forget_prompt=forget_prompt,
        replace_prompt=replace_prompt,
        preset=preset,
        max_train_steps=max_train_steps,
        train_batch_size=train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        forget_alpha=forget_alpha,
        gamma=gamma,
        mask_fraction=mask_fraction,
        mask=mask,
        fisher_batches=fisher_batches,
        trained_weights=trained_weights,
        tie_embeddings=tie_embeddings,
        ema_decay=ema_decay,
        save_weights=save_weights.value,
        mixed_precision=mixed_precision.value,
        weights_dtype=weights_dtype.value,
        optimizer_in_backward=optimizer_in_backward,
        fisher_storage=fisher_storage.value,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        checkpointing_steps=checkpointing_steps,
        checkpoints_total_limit=checkpoints_total_limit,
        resume_from_checkpoint=resume_from_checkpoint,
        work_dir=work_dir,
        keep_work=keep_work,
        classifier=classifier,
        fid_weights=fid_weights,
        samples=samples,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        strict=strict,
        seed=seed,
        device=start_ranks(checked_device(device)),
        parallel=parallel.value,
    )
    return _forget(options, dry_run, json_file)


def _forget(options: ForgetOptions, dry_run: bool, json_file: Path | None) -> int:
    from ..errors import Terminated
    from ..jobs.dry_run import estimate_run
    from ..jobs.output import RESULT
    from ..jobs.plan import make_plan
    from ..jobs.publishing import how_to_go_on
    from ..jobs.run import ForgetRun
    from ..jobs.space import check_room
    from ..models.written import OWN_FOLDER
    from .backend import load_backend
    from .progress import stages

    inputs = (options.pretrained_model_name_or_path, options.data, options.class_map, options.mask, options.classifier)
    check_file("--json", json_file, options.output_dir, inputs=inputs)
    quiet = int(os.environ.get("RANK", "0")) > 0  # the first rank tells
    console = plain_console(quiet=quiet, json_file=json_file)
    errors = plain_console(stderr=True, quiet=quiet)
    with errors.status("opening the model and the data"), _without_bars():
        plan = make_plan(options)
    show_plan(plan, console)
    if dry_run:
        with errors.status("trying single batches"):
            estimate = estimate_run(plan)
        rooms = plan.rooms()
        show_estimate(estimate, rooms, console)
        if json_file is not None:
            write_report(planned(plan, estimate, rooms), json_file)
        check_room(rooms)
        return 0
    load_backend(errors)
    file = options.output_dir / OWN_FOLDER / RESULT
    try:
        with stages(errors) as progress:
            forget_run = ForgetRun(plan, progress)
            forget_run.run(lambda report, whole: write_report(report, file, json_file if whole else None))
        if not plan.first:
            return 0
        return show_result(plan, json.loads(file.read_text(encoding="utf-8")), console)
    except Terminated as stopped:
        stopped.advice = how_to_go_on(plan)
        raise


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar for every network it opens."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
