"""A run of ``unlearn-ext forget`` before it starts: everything opened, checked and drawn, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..data.drawing import Draw, draw_indices
from ..data.latents import latents_size
from ..distributed.hashing import weights_hash
from ..distributed.wrappers import trainable
from ..errors import InputError
from ..methods import SFRon
from ..models.sampling import check_steps
from ..models.weights import select_trained
from ..models.written import Plan, plan_result
from ..run.unlearner import Unlearner
from ..tasks import Task
from .earlier import check_mask, check_resumed
from .estimate import sizes_on_disk
from .opening import Opened, claimable_work, open_sources
from .options import ForgetOptions
from .output import is_in_result, is_waiting, unfinished_bytes
from .parallel import world_size, wrap
from .pictures import Pictures, make_pictures
from .precision import cast_trained
from .preset import averages_decay, guidance_for_pictures, make_method, make_task, task_settings, tie_embedders
from .space import Need, Room, room_for
from .work import WorkFolder

__all__ = ["ForgetPlan", "draw_images", "make_plan"]

_MOST_DRAWN = 2**28  # indices of each set, 2 GB
_IN_WORK = ("latents", "checkpoints", "Fisher sums")  # of what a run writes: in the work folder


@dataclass(frozen=True, eq=False, kw_only=True)
class ForgetPlan(Opened):
    """What a run will do, which :class:`ForgetRun` runs.

    Attributes:
        work: the work folder.
        method, task: the preset's, with what the options change.
        ema_decay: of the averages that are saved; None where the last weights are.
        tied: whether a DiT's embedder copies are one for the run.
        trained_count: how many weights may move.
        folder: what the written folder will hold.
        draw: indices of the images that will be used, unless some cannot be read.
    """

    work: WorkFolder
    method: SFRon
    task: Task
    ema_decay: float | None
    tied: bool
    trained_count: int
    folder: Plan
    draw: Draw
    pictures: Pictures
    unlearner: Unlearner

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.options.resume_from_checkpoint is not None

    @property
    def first(self) -> bool:
        """Whether this process writes and tells what all ranks have done."""
        return self.unlearner.ranks.first

    @property
    def notes(self) -> list[str]:
        """What was taken otherwise than it stands in the folders that were opened, each in a sentence."""
        judge = self.pictures.judge
        return [*self.pretrained.notes, *([judge.note] if judge is not None and judge.note else [])]

    @property
    def fisher_batches(self) -> tuple[int, int]:
        """Batches of the forget and of the retain set that are measured for the mask."""
        return measured_batches(self.method)

    def left_out(self) -> dict[str, str]:
        """Files of the source that the written folder has not, and why."""
        output = self.options.output_dir
        return {name: why for name, why in self.folder.left_out.items() if not is_in_result(output, name)}

    @property
    def disk(self) -> dict[str, int]:
        """Bytes that the run will write: what -> bytes."""
        sizes = {"denoiser": self.folder.denoiser_bytes, "other files": self.folder.copied_bytes}
        if self.encodes:
            sizes["latents"] = latents_size(self.pretrained.latent_shape, len(self.draw.indices))
        if self.options.fisher_storage == "disk" and self.method.needs_fisher:
            sizes["Fisher sums"] = 4 * self.trained_count
        ema, checkpoints = self.ema_decay is not None, self.checkpoints_at_once()
        return sizes | sizes_on_disk(self.model, self.method, ema=ema, checkpoints=checkpoints)

    def rooms(self) -> list[Room]:
        """By disk, what will be written there beyond what an unfinished run left, and what is free."""
        output, held = self.options.output_dir, self.work.held()
        published = sum(size for what, size in self.disk.items() if what not in _IN_WORK)
        kept = sum(max(0, self.disk.get(what, 0) - held.get(what, 0)) for what in _IN_WORK)
        return room_for(
            [
                Need("--output-dir", output, published - unfinished_bytes(output)),
                Need("the work folder", self.work.path, kept),
            ]
        )

    def checkpoints_at_once(self) -> int:
        """The most checkpoints that there are at one time."""
        if self.options.checkpointing_steps is None:
            return 0
        made = self.method.iterations // self.options.checkpointing_steps
        limit = self.options.checkpoints_total_limit
        return made if limit is None else min(made, limit + 1)


def make_plan(options: ForgetOptions) -> ForgetPlan:
    """Opens and checks everything and draws what will be used; writes nothing.

    Raises:
        InputError: something cannot be opened, does not fit the rest, or is not there.
    """
    work = claimable_work(options)
    opened = open_sources(options)
    method, task = make_method(opened), make_task(opened)
    ema_decay, tied, model = averages_decay(opened), tie_embedders(opened), opened.model
    select_trained(model, options.trained_weights or opened.domain["run"].get("trained_weights", "all"))
    trained_count = sum(p.numel() for p in trainable(model).values())  # tied copies once
    folder = plan_result(opened.pretrained.folder, opened.pretrained)  # of the sizes that are written: before any cast
    whole = _prepare_model(opened)
    if opened.pretrained.image_shape is None:
        raise InputError(
            f"{options.pretrained_model_name_or_path} makes latents and has no VAE to show them: give the whole "
            "pipeline's folder"
        )
    draw = draw_images(opened, method)
    pictures = make_pictures(opened, task, guidance_for_pictures(opened))
    check_steps("--num-inference-steps", options.num_inference_steps, opened.pretrained.scheduler)
    if method.mask is not None:
        check_mask(method.mask, options.mask, opened.forget_set, trainable(model))
    unlearner = _make_unlearner(whole, opened, method, task, ema_decay)
    if options.resume_from_checkpoint is not None and not is_waiting(options.output_dir):  # its checkpoints may be gone
        check_resumed(unlearner, work.path, options.resume_from_checkpoint)
    return ForgetPlan(
        **vars(opened),
        work=work,
        method=method,
        task=task,
        ema_decay=ema_decay,
        tied=tied,
        trained_count=trained_count,
        folder=folder,
        draw=draw,
        pictures=pictures,
        unlearner=unlearner,
    )


def measured_batches(method: SFRon) -> tuple[int, int]:
    """Batches of the forget and of the retain set that are measured for the mask."""
    return method.fisher_limits if method.needs_fisher else (0, 0)


def draw_images(opened: Opened, method: SFRon, exclude: Iterable[int] = ()) -> Draw:
    """The images of every batch: of the iterations, or of the Fisher pass where that takes more.

    Args:
        exclude: indices that are not drawn.
    """
    options, fisher_batches = opened.options, measured_batches(method)
    steps = method.iterations * options.gradient_accumulation_steps
    if steps * opened.batch_size > _MOST_DRAWN:
        raise InputError(
            f"--max-train-steps {method.iterations}, --gradient-accumulation-steps and --train-batch-size "
            f"{opened.batch_size}: {steps * opened.batch_size:,} images would be drawn of each set, and at most "
            f"{_MOST_DRAWN:,} can be: lower one of them"
        )
    return draw_indices(
        opened.data.labels,
        opened.forget_classes,
        max(steps, fisher_batches[0]),
        opened.batch_size,
        options.seed,
        retain_batches=max(steps, fisher_batches[1]),
        replace_classes=opened.concepts.replace_classes if opened.concepts is not None else (),
        exclude=exclude,
    )


def _prepare_model(opened: Opened) -> nn.Module:
    """The denoiser in the precision and memory format of the run, over all ranks."""
    options, model = opened.options, opened.model
    if opened.in_bfloat16:
        cast_trained(model, torch.bfloat16)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if world_size() == 1:
        return model
    for option, is_set in (
        ("--weights-dtype bfloat16", opened.in_bfloat16),
        ("--optimizer-in-backward", options.optimizer_in_backward),
        ("--fisher-storage", options.fisher_storage != "device"),
        ("--channels-last with --parallel fsdp", options.channels_last and options.parallel == "fsdp"),
    ):
        if is_set:
            raise InputError(f"{option} is for one process: leave it out, or run without torchrun")
    return wrap(model, options.parallel)


def _make_unlearner(model: nn.Module, opened: Opened, method: SFRon, task: Task, ema_decay: float | None) -> Unlearner:
    options = opened.options
    identity = {
        **opened.forget_set,
        "starting_weights": weights_hash(opened.model.named_parameters()),
        "seed": str(options.seed),
        "batch_size": str(opened.batch_size),
        "max_train_steps": str(method.iterations),  # on which the drawn images depend
        "task": json.dumps(task_settings(opened)),
    }
    return Unlearner(
        model,
        task,
        method,
        device=options.device,
        mixed_precision="bf16" if opened.in_bfloat16 else options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        ema_decay=ema_decay,
        identity=identity,
        optimizer_in_backward=options.optimizer_in_backward,
        fisher_storage=options.fisher_storage,
    )
