"""A run of ``unlearn-ext forget``: from its plan to a diffusers folder that has forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.drawing import Draw, until_readable
from ..data.images import ImageData
from ..data.latents import LatentData, encode_latents
from ..distributed.shards import local
from ..distributed.wrappers import trainable
from ..errors import UnlearnError
from ..models.weights import untie_embeddings
from ..models.written import OWN_FOLDER
from ..run.lock import hold_on_first
from ..run.result import Progress, Result
from ..utils.clock import timed
from ..utils.files import writable_directory, write_json
from .output import RESULT, check_claim, claim_output
from .parallel import gather_weights
from .plan import ForgetPlan, draw_images
from .precision import cast_trained, widen_trained
from .prompts import WithReplacements
from .publishing import Record, finish_earlier, publish
from .space import check_room, explain_out_of_memory

__all__ = ["ForgetRun"]


class ForgetRun:
    """One run of a plan.

    Attributes:
        draw: indices of the images that are used: the plan's, or others in place of unreadable ones.
        seconds: stage -> seconds that it took.
    """

    def __init__(self, plan: ForgetPlan, progress: Progress | None = None):
        self.plan, self.draw = plan, plan.draw
        self.progress = progress or (lambda stage, done, total: None)
        self.seconds: dict[str, float] = {}

    def run(self, record: Record | None = None) -> dict[str, Any]:
        """Everything, and the result that is written as ``unlearning/result.json``.

        Args:
            record: writes the result in place of that file: called with what is known before the model is judged, and
                with True beside it when all is in it, both before the model gets its name: a folder with a model has
                its result as well, at whatever moment the process is killed.
        """
        plan, output = self.plan, self.plan.options.output_dir
        if plan.options.strict or not plan.encodes:  # before anything is written
            self._verify()
        with self._together():
            made = plan.first and not output.exists()
            if plan.first:
                check_claim(output, plan.pretrained.folder, resume=plan.resumes)
                writable_directory(output)
        try:
            with hold_on_first(output, plan.unlearner.ranks):
                return self._run(record)
        except UnlearnError:
            for folder in (output / OWN_FOLDER, output) if made else ():
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
            raise

    def _run(self, record: Record | None) -> dict[str, Any]:
        plan, options = self.plan, self.plan.options
        records = self._claim() / OWN_FOLDER
        forget, retain = self._loaders(self._encode_in_turn() if plan.encodes else plan.data)
        if plan.pictures.fid is not None:
            with self._together():
                if plan.first:
                    self._take_real()
        with widen_trained(plan.model, plan.in_bfloat16):
            self._take_pictures("before")
        result = self._unlearn(forget, retain)
        if plan.in_bfloat16:
            cast_trained(plan.model, torch.float32)
        if options.save_weights == "ema":
            self._take_averages(result)
        self._take_pictures("after")
        if result.mask is not None:
            result.mask.metadata.pop("forget_hash", None)  # of the batches drawn, which another run may draw otherwise
            result.mask.metadata.update(plan.forget_set)
            if plan.method.mask is None:  # else it is an earlier run's
                result.mask.metadata["seed"] = str(options.seed)
        weights = gather_weights(plan.model)
        if not plan.first:
            return {}
        if plan.tied and weights is None:
            untie_embeddings(plan.model)
        record = record or (lambda report, whole: write_json(records / RESULT, report))
        return publish(plan, result, records, weights, record, self.seconds, self.progress)

    def _unlearn(self, forget: DataLoader, retain: DataLoader) -> Result:
        plan, options = self.plan, self.plan.options
        if plan.in_bfloat16:
            torch.manual_seed(options.seed)  # of the rounding
        with explain_out_of_memory(options.device, f"a batch of {plan.batch_size}"):
            result = plan.unlearner.run(
                forget,
                retain,
                output_dir=plan.work.path,
                checkpointing_steps=options.checkpointing_steps,
                checkpoints_total_limit=options.checkpoints_total_limit,
                resume_from_checkpoint=options.resume_from_checkpoint,
                allow_duplicates=True,  # told apart by their labels: a data set may hold a picture twice
                progress=self.progress,
            )
        self.seconds.update(result.timings)
        return result

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return self.plan.unlearner.ranks.together()

    def _claim(self) -> Path:
        plan, output = self.plan, self.plan.options.output_dir
        with self._together():
            if plan.first:
                finish_earlier(plan)
                claim_output(output, plan.pretrained.folder, resume=plan.resumes)
                with self._discard_work_on_error():
                    check_room(plan.rooms())
                    plan.work.claim()
                    writable_directory(output / OWN_FOLDER)
        return output

    @contextlib.contextmanager
    def _discard_work_on_error(self) -> Iterator[None]:
        """What is wrong with the data or the VAE may show late: then no work folder stays that this run has made."""
        try:
            yield
        except UnlearnError:
            self.plan.work.discard()
            raise

    # --- Data -----------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Reads every sample that will be used, and draws others for those that cannot be read."""
        data, strict = self.plan.data, self.plan.options.strict

        def read(draw: Draw) -> None:
            data.verify(draw.indices.tolist(), strict=strict, progress=partial(self.progress, "looking at the data"))

        with timed(self.seconds, "decoding"):
            self.draw = until_readable(data, self._draw, read)

    def _draw(self, exclude: Sequence[int] = ()) -> Draw:
        return draw_images(self.plan, self.plan.method, exclude)

    def _encode_in_turn(self) -> LatentData:
        """By the first rank; the others find what it has written."""
        directory = self.plan.work.latents
        with self._together(), self._discard_work_on_error():
            latents = self._encode(directory) if self.plan.first else None
        return self._encode(directory) if latents is None else latents

    def _encode(self, directory: Path) -> LatentData:
        """The latents of every image that will be used, each decoded and encoded once; others for unreadable ones."""
        latents: LatentData
        data, vae = self.plan.data, self.plan.pretrained.vae

        def read(draw: Draw) -> None:
            nonlocal latents
            progress = partial(self.progress, "encoding latents")
            latents = encode_latents(data, draw.indices, vae, directory, skip_unreadable=True, progress=progress)

        with timed(self.seconds, "encoding"):
            self.draw = until_readable(data, self._draw, read)
        return latents

    def _loaders(self, data: ImageData | LatentData) -> Iterator[DataLoader]:
        for name in ("forget", "retain"):
            batches: Tensor = getattr(self.draw, name)
            dataset: Dataset = data
            if name == "forget" and self.draw.replace is not None:
                dataset, batches = WithReplacements(data), torch.stack([batches, self.draw.replace], dim=-1)
            if isinstance(data, LatentData):
                batches = data.positions(batches)
            collate = self.plan.collate(name == "forget")
            yield DataLoader(dataset, batch_sampler=_Fixed(batches), collate_fn=collate)

    # --- Pictures and averages ------------------------------------------------------------------------------

    def _take_real(self) -> None:
        """Before anything is trained: what is wrong with these images is found before time is spent."""
        with timed(self.seconds, "FID_real"):
            self.plan.pictures.fid.add_real(
                strict=self.plan.options.strict,
                looking=partial(self.progress, "looking at images for FID"),
                progress=partial(self.progress, "FID, real images"),
            )

    def _take_pictures(self, when: str) -> None:
        pictures, device = self.plan.pictures, self.plan.options.device
        what = f"sampling {len(pictures.labels)} pictures"
        with timed(self.seconds, f"sampling_{when}"), explain_out_of_memory(device, what, "lower --samples"):
            pictures.take(when, partial(self.progress, f"sampling {when}"))

    def _take_averages(self, result: Result) -> None:
        with torch.no_grad():
            for name, p in trainable(self.plan.model).items():
                local(p).copy_(local(result.ema[name]))


class _Fixed:
    """Batches that were drawn before; the same at every pass."""

    def __init__(self, batches: Tensor):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return iter(self.batches.tolist())
