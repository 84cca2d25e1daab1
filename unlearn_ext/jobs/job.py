"""``unlearn-ext forget``: from a diffusers folder and data to a diffusers folder that has forgotten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.drawing import Draw, draw_indices, until_readable
from ..data.images import ImageData, count_classes, is_sorted, open_data
from ..data.latents import LatentData, encode_latents, latents_size
from ..distributed.hashing import weights_hash
from ..distributed.shards import local
from ..distributed.wrappers import trainable
from ..errors import InputError, UnlearnError, is_out_of_memory
from ..methods import DOMAINS, SFRon
from ..models.judge import Judge
from ..models.pretrained import Pretrained, open_pretrained
from ..models.sampling import check_steps
from ..models.weights import select_trained, tie_embeddings, untie_embeddings
from ..models.written import OWN_FOLDER, Plan, plan_result
from ..run.lock import hold_on_first
from ..run.loop import Progress
from ..run.unlearner import Result, Unlearner
from ..saliency import SaliencyMask
from ..tasks import ClassConditionalDiffusion, Task, TextConditionalDiffusion
from ..utils.arguments import check_choice
from ..utils.clock import timed
from ..utils.files import writable_directory, write_json
from .dry_run import estimate_run
from .earlier import check_mask, check_resumed
from .estimate import Estimate, sizes_on_disk
from .fid import RetainedFID
from .options import ForgetOptions, each_of
from .output import RESULT, check_claim, claim_output, is_in_result, is_waiting, unfinished_bytes
from .parallel import gather_weights, world_size, wrap
from .pictures import Pictures, spread
from .prompts import Concepts, WithReplacements, read_prompts
from .publishing import finish_earlier, publish
from .space import Need, Room, check_room, room_for
from .work import WorkFolder

__all__ = ["ForgetJob"]

_MOST_DRAWN = 2**28  # indices of each set, 2 GB
_IN_WORK = ("latents", "checkpoints", "Fisher sums")  # of what a run writes: in the work folder
_SMALLER_BATCHES = "lower --train-batch-size, or add --gradient-checkpointing or --optimizer-in-backward"
JUDGED_SAMPLES = 16  # of each class, unless --samples says otherwise
_PRESETS = {"UNet2DModel": "ddpm-cifar10", "DiTTransformer2DModel": "dit-xl-2-256", "UNet2DConditionModel": "sd-nudity"}


class ForgetJob:
    """One run. The constructor opens and checks everything and draws what will be used; it writes nothing.

    Attributes:
        pretrained: the opened folder.
        data: the opened data; ``data.mapping`` says which folder is which class, and how many images it has.
        forget_classes: indices into the data's classes.
        method, task, domain: the preset's, with what the options change.
        fisher_batches: of the forget and of the retain set, that are measured for the mask.
        trained, trained_count: names of the weights that may move, and how many they are.
        draw: indices of the images that will be used.
    """

    def __init__(self, options: ForgetOptions, progress: Progress | None = None):
        self.options = options
        self.progress = progress or (lambda stage, done, total: None)
        self.seconds: dict[str, float] = {}
        self._resume = options.resume_from_checkpoint is not None
        self.work = WorkFolder(options.output_dir, options.work_dir)
        for option, folder in (("--output-dir", options.output_dir), ("--work-dir", self.work.path)):
            if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(options.data)):
                raise InputError(
                    f"{option}: {folder} lies in --data, where the next run would take it for a class: choose a folder "
                    "outside it"
                )
        source = options.pretrained_model_name_or_path
        check_claim(options.output_dir, source, resume=self._resume, options=options.settings())
        if not is_waiting(options.output_dir):
            self.work.check(options.pretrained_model_name_or_path, resume=self._resume)
        self.pretrained: Pretrained = open_pretrained(
            options.pretrained_model_name_or_path, device=options.device, null_class=options.null_class
        )
        self.model: nn.Module = self.pretrained.denoiser
        self._check_kind()
        self._check_null_class()
        self.preset = options.preset or _PRESETS[type(self.model).__name__]
        check_choice("--preset", self.preset, DOMAINS)
        self.domain = DOMAINS[self.preset]
        self.batch_size = options.train_batch_size or self.domain["run"]["train_batch_size"]
        self.data: ImageData = self._open_data()
        self.concepts: Concepts | None = None
        if self.pretrained.kind == "text":
            prompts = each_of(options.forget_prompt)
            self.concepts = read_prompts(self.data, options.class_map, prompts, options.replace_prompt)
            self.forget_classes = self.concepts.forget
        else:
            chosen = (index for text in each_of(options.forget_class) for index in self.data.parse_classes(text))
            self.forget_classes = list(dict.fromkeys(chosen))
        self.method = self._make_method()
        if self.method.replaces != (self.pretrained.kind == "text"):
            told = "prompts" if self.pretrained.kind == "text" else "classes"
            raise InputError(f"--preset {self.preset} is for other models than those that are told {told}")
        self.fisher_batches = self._limit_fisher()
        if self.method.needs_fisher:  # else loaders that the iterations made long would be measured whole
            self.method = replace(self.method, fisher_batches=self.fisher_batches)
        self.task = self._make_task()
        self.ema_decay = self._ema_decay()
        self.tied = self._ties()
        self.trained = select_trained(
            self.model, options.trained_weights or self.domain["run"].get("trained_weights", "all")
        )
        self.trained_count = sum(p.numel() for p in trainable(self.model).values())  # tied copies once
        self.in_bfloat16 = options.weights_dtype == "bfloat16"
        self.mixed_precision = "bf16" if self.in_bfloat16 else options.mixed_precision
        _ = self._plan  # of the sizes that are written; and what cannot be copied is found here
        if self.in_bfloat16:
            self._cast(torch.bfloat16)
        if options.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.world_size = world_size()
        self._check_ranks()
        whole = self.model if self.world_size == 1 else wrap(self.model, options.parallel)
        if self.pretrained.image_shape is None:
            raise InputError(
                f"{options.pretrained_model_name_or_path} makes latents and has no VAE to show them: give the whole "
                "pipeline's folder"
            )
        self.draw: Draw = self._draw()
        self.pictures = self._make_pictures()
        check_steps("--num-inference-steps", options.num_inference_steps, self.pretrained.scheduler)
        if self.method.mask is not None:
            check_mask(self.method.mask, options.mask, self._identity(), trainable(self.model))
        self.unlearner = self._make_unlearner(whole)
        if self._resume and not is_waiting(options.output_dir):  # of which the checkpoints may have gone
            check_resumed(self.unlearner, self.work.path, options.resume_from_checkpoint)

    def _check_ranks(self) -> None:
        """What several ranks cannot do, by the names of the options."""
        options = self.options
        for option, given in (
            ("--weights-dtype bfloat16", options.weights_dtype == "bfloat16"),
            ("--optimizer-in-backward", options.optimizer_in_backward),
            ("--fisher-storage", options.fisher_storage != "device"),
            ("--channels-last with --parallel fsdp", options.channels_last and options.parallel == "fsdp"),
        ):
            if given and self.world_size > 1:
                raise InputError(f"{option} is for one process: leave it out, or run without torchrun")

    # --- Opening --------------------------------------------------------------------------------------------

    def _check_kind(self) -> None:
        options, kind = self.options, self.pretrained.kind
        name = type(self.model).__name__
        if name not in _PRESETS:
            raise InputError(f"the denoiser is a {name}, and {', '.join(_PRESETS)} are supported")
        if kind == "text" and options.forget_prompt is None:
            raise InputError("the model is told prompts: give --forget-prompt and --replace-prompt, not --forget-class")
        if kind == "class" and options.forget_class is None:
            raise InputError("the model is told classes: give --forget-class, not --forget-prompt")

    def _check_null_class(self) -> None:
        """No file of a UNet2DModel says whether it has one: the user does, or the data hold just the other classes."""
        options, name = self.options, type(self.model).__name__
        if name != "UNet2DModel":
            if options.null_class is not None:
                raise InputError(
                    f"--null-class and --no-null-class are for a UNet2DModel, and the model is a {name}: leave them out"
                )
            return
        embeddings = self.model.config.num_class_embeds
        if options.null_class is None and not self._mapped and count_classes(options.data) == embeddings:
            raise InputError(
                f"{options.data} has {embeddings} class folders, as many as the model has class embeddings: say "
                "--no-null-class if each of them is a class of its own, or move away the folder that is none"
            )

    @property
    def _mapped(self) -> bool:
        """Whether the data say which class is which, so that some may be missing."""
        class_map = self.options.class_map
        return (class_map is not None and not is_sorted(class_map)) or not self.options.data.is_dir()

    def _open_data(self) -> ImageData:
        options, settings = self.options, self.pretrained.data_settings()
        if self.pretrained.kind == "text":
            return open_data(options.data, **settings)
        settings["class_map"] = options.class_map
        known = self.pretrained.classes.count
        asked = type(self.model).__name__ == "UNet2DModel" and options.null_class is None and self._mapped
        if asked:
            settings["classes"] = known + 1
        data = open_data(options.data, **settings)
        if asked and set(data.counts) != set(range(known)):
            raise InputError(
                f"the model has {known + 1} class embeddings and the data hold {len(data.counts)} classes, up to "
                f"{max(data.counts)}: say with --null-class that the last embedding stands for no class, or with "
                "--no-null-class that it is a class"
            )
        data.classes = known
        return data

    def _ties(self) -> bool:
        """Whether a DiT's embedder copies are one for the run; tied here."""
        asked, can = self.options.tie_embeddings, hasattr(self.model, "transformer_blocks")
        if asked and not can:
            raise InputError(f"--tie-embeddings: a {type(self.model).__name__} has no embedder copies; leave it out")
        if not can or asked is False or (asked is None and not self.domain["run"].get("tie_embeddings")):
            return False
        try:
            tie_embeddings(self.model)
        except InputError as error:
            raise InputError(f"{error}: use --no-tie-embeddings to train them as copies") from None
        return True

    @property
    def names(self) -> dict[int, str]:
        """Class -> label text, or its number; the first class of each prompt -> the prompt."""
        if self.concepts is not None:
            return self.concepts.distinct
        return {i: self.pretrained.id2label.get(i, str(i)) for i in range(self.pretrained.classes.count)}

    def _make_method(self) -> SFRon:
        options = self.options
        changes: dict[str, Any] = {
            "iterations": options.max_train_steps,
            "lr": options.learning_rate,
            "forget_alpha": options.forget_alpha,
            "gamma": options.gamma,
            "mask_fraction": options.mask_fraction,
            "fisher_batches": options.fisher_batches,
            "mask": None if options.mask is None else SaliencyMask.load(options.mask),
            "stochastic_rounding": options.weights_dtype == "bfloat16" or None,
        }
        return SFRon.preset(self.preset, **{name: value for name, value in changes.items() if value is not None})

    def _make_task(self) -> Task:
        pretrained, given = self.pretrained, self.domain["task"]
        settings: dict[str, Any] = {
            "reduction": given["reduction"],
            "guidance": given["guidance"],
            "antithetic": given.get("antithetic", False),
            "scaling_factor": pretrained.scaling_factor,
            "seed": self.options.seed,
        }
        self.task_settings = settings  # as they are in the end, for the result
        if pretrained.kind == "text":
            settings["prompt_dropout"] = given.get("prompt_dropout", 0.0)
            return TextConditionalDiffusion(
                pretrained.scheduler, pretrained.text_encoder, pretrained.tokenizer, **settings
            )
        settings["label_dropout"] = given.get("label_dropout", 0.0)
        if not pretrained.classes.has_null:
            settings.update(label_dropout=0.0, guidance=None)
        return ClassConditionalDiffusion(pretrained.scheduler, null_label=pretrained.classes.null_label, **settings)

    def _make_unlearner(self, model: nn.Module) -> Unlearner:
        options = self.options
        identity = {
            **self._identity(),
            "starting_weights": weights_hash(self.model.named_parameters()),
            "seed": str(options.seed),
            "batch_size": str(self.batch_size),
            "max_train_steps": str(self.method.iterations),  # on which the drawn images depend
            "task": json.dumps(self.task_settings),
        }
        return Unlearner(
            model,
            self.task,
            self.method,
            device=options.device,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            ema_decay=self.ema_decay,
            identity=identity,
            optimizer_in_backward=options.optimizer_in_backward,
            fisher_storage=options.fisher_storage,
        )

    @property
    def notes(self) -> list[str]:
        """What was taken otherwise than it stands in the folders that were opened, each in a sentence."""
        judge = self.pictures.judge
        return [*self.pretrained.notes, *([judge.note] if judge is not None and judge.note else [])]

    def left_out(self) -> dict[str, str]:
        """Files of the source that the written folder has not, and why."""
        output = self.options.output_dir
        return {name: why for name, why in self._plan.left_out.items() if not is_in_result(output, name)}

    @property
    def retained_count(self) -> int:
        """Retained classes that have data; of prompts, each once."""
        return sum(index in self.data.counts and index not in self.forget_classes for index in self.names)

    def _make_pictures(self) -> Pictures:
        options, names = self.options, self.names
        there = [index for index in names if index in self.data.counts]
        retained = spread([index for index in there if index not in self.forget_classes])
        judged = options.classifier is not None or options.fid_weights is not None
        each = (options.samples or JUDGED_SAMPLES) if judged else 1
        judge = fid = None
        if options.classifier is not None:
            judge = Judge(options.classifier, names, self.pretrained.image_shape, options.device)
        if options.fid_weights is not None:
            of = {index: self.concepts.of_prompt(index) if self.concepts else [index] for index in retained}
            fid = RetainedFID(options.fid_weights, self.data, of, each, options.seed, options.device)
        return Pictures(
            self.pretrained,
            self.task,
            names,
            [index for index in self.forget_classes if index in there],
            retained,
            each=each,
            steps=options.num_inference_steps,
            guidance=self._guidance,
            seed=options.seed,
            concepts=self.concepts,
            judge=judge,
            fid=fid,
        )

    @property
    def _guidance(self) -> float | None:
        given = self.options.guidance_scale
        without_null = self.pretrained.classes is not None and not self.pretrained.classes.has_null
        if without_null and given not in (None, 1.0):
            raise InputError("--guidance-scale needs a null class, and the model has none: leave it out")
        if given is not None:
            return given
        if without_null:
            return None
        return self.domain["run"].get("sampling", {}).get("guidance_for_pictures", self.domain["task"].get("guidance"))

    # --- What will be used ----------------------------------------------------------------------------------

    def _limit_fisher(self) -> tuple[int, int]:
        """Batches of the forget and of the retain set that are measured: at most a pass over each."""
        if not self.method.needs_fisher:
            return 0, 0
        forget = int(torch.isin(self.data.labels, torch.tensor(self.forget_classes, device="cpu")).sum())
        whole = [-(-count // self.batch_size) for count in (forget, len(self.data) - forget)]
        forget, retain = (min(n, limit or n) for n, limit in zip(whole, self.method.fisher_limits, strict=True))
        return max(1, forget), max(1, retain)  # a set without images is refused when batches are drawn

    @property
    def _lengths(self) -> tuple[int, int]:
        """Batches in the forget and in the retain loader: those of the iterations or of the Fisher pass."""
        steps = self.method.iterations * self.options.gradient_accumulation_steps
        if steps * self.batch_size > _MOST_DRAWN:
            raise InputError(
                f"--max-train-steps {self.method.iterations}, --gradient-accumulation-steps and --train-batch-size "
                f"{self.batch_size}: {steps * self.batch_size:,} images would be drawn of each set, and at most "
                f"{_MOST_DRAWN:,} can be: lower one of them"
            )
        return max(steps, self.fisher_batches[0]), max(steps, self.fisher_batches[1])

    def _draw(self, exclude: Iterable[int] = ()) -> Draw:
        forget, retain = self._lengths
        return draw_indices(
            self.data.labels,
            self.forget_classes,
            forget,
            self.batch_size,
            self.options.seed,
            retain_batches=retain,
            replace_classes=self.concepts.replace_classes if self.concepts is not None else (),
            exclude=exclude,
        )

    def estimate(self) -> Estimate:
        """Memory by stage and part, time and disk. Nothing is written, and the run that may follow is not disturbed."""
        if self.world_size > 1:
            raise InputError("--dry-run tries batches in one process: run it without torchrun")
        return estimate_run(self)

    @property
    def disk(self) -> dict[str, int]:
        """Bytes that the run will write: what -> bytes."""
        sizes = {"denoiser": self._plan.denoiser_bytes, "other files": self._plan.copied_bytes}
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

    @cached_property
    def _plan(self) -> Plan:
        return plan_result(self.pretrained.folder, self.pretrained)

    def checkpoints_at_once(self) -> int:
        if self.options.checkpointing_steps is None:
            return 0
        made = self.method.iterations // self.options.checkpointing_steps
        limit = self.options.checkpoints_total_limit
        return made if limit is None else min(made, limit + 1)

    def collate(self, forget: bool) -> Callable[..., Any]:
        return default_collate if self.concepts is None else self.concepts.collate(forget)

    # --- The run --------------------------------------------------------------------------------------------

    def run(self, record: Callable[[dict[str, Any], bool], Any] | None = None) -> dict[str, Any]:
        """Everything, and the result that is written as ``unlearning/result.json``.

        Args:
            record: writes the result in place of that file: called with what is known before the model is judged, and
                with True beside it when all is in it, both before the model gets its name: a folder with a model has
                its result as well, at whatever moment the process is killed.
        """
        output = self.options.output_dir
        if self.options.strict or not self.encodes:  # before anything is written
            self._verify()
        with self._together():
            made = self.first and not output.exists()
            if self.first:
                check_claim(output, self.pretrained.folder, resume=self._resume)
                writable_directory(output)
        try:
            with hold_on_first(output, self.unlearner.ranks):
                return self._run(record)
        except UnlearnError:
            for folder in (output / OWN_FOLDER, output) if made else ():
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
            raise

    def _run(self, record: Callable[[dict[str, Any], bool], Any] | None) -> dict[str, Any]:
        options = self.options
        own = self._claim() / OWN_FOLDER
        forget, retain = self._loaders(self._encode_in_turn() if self.encodes else self.data)
        if self.pictures.fid is not None:
            with self._together():
                if self.first:
                    self._take_real()
        with self.in_float32():
            self._take_pictures("before")
        if self.in_bfloat16:
            torch.manual_seed(options.seed)  # of the rounding
        with self.fitting():
            result = self.unlearner.run(
                forget,
                retain,
                output_dir=self.work.path,
                checkpointing_steps=options.checkpointing_steps,
                checkpoints_total_limit=options.checkpoints_total_limit,
                resume_from_checkpoint=options.resume_from_checkpoint,
                allow_duplicates=True,  # told apart by their labels: a data set may hold a picture twice
                progress=self.progress,
            )
        self.seconds.update(result.timings)
        if self.in_bfloat16:
            self._cast(torch.float32)
        if options.save_weights == "ema":
            self._take_averages(result)
        self._take_pictures("after")
        if result.mask is not None:
            result.mask.metadata.pop("forget_hash", None)  # of the batches drawn, which another run may draw otherwise
            result.mask.metadata.update(self._identity())
            if self.method.mask is None:  # else it is an earlier run's
                result.mask.metadata["seed"] = str(options.seed)
        weights = gather_weights(self.model)
        if not self.first:
            return {}
        if self.tied and weights is None:
            untie_embeddings(self.model)
        return publish(self, result, own, weights, record or (lambda found, whole: write_json(own / RESULT, found)))

    @property
    def first(self) -> bool:
        """Whether this process writes and tells what all ranks have done."""
        return self.unlearner.ranks.first

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return self.unlearner.ranks.together()

    def _claim(self) -> Path:
        options = self.options
        with self._together():
            if self.first:
                finish_earlier(self)
                claim_output(options.output_dir, self.pretrained.folder, resume=self._resume)
                with self._discarding_work():
                    check_room(self.rooms())
                    self.work.claim()
                    writable_directory(options.output_dir / OWN_FOLDER)
        return options.output_dir

    def _encode_in_turn(self) -> LatentData:
        """By the first rank; the others find what it has written."""
        directory = self.work.latents
        with self._together(), self._discarding_work():
            latents = self._encode(directory) if self.first else None
        return self._encode(directory) if latents is None else latents

    @contextlib.contextmanager
    def _discarding_work(self) -> Iterator[None]:
        """What is wrong with the data or the VAE may show late: then no work folder stays that this run has made."""
        try:
            yield
        except UnlearnError:
            self.work.discard()
            raise

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """The trained weights are as wide as they are written: for pictures before and after alike."""
        if not self.in_bfloat16:
            yield
            return
        self._cast(torch.float32)
        try:
            yield
        finally:
            self._cast(torch.bfloat16)

    def _cast(self, dtype: torch.dtype) -> None:
        """Frozen weights and buffers stay as they were read, for they are written so."""
        for p in trainable(self.model).values():
            if p.dtype != dtype:
                p.data = p.data.to(dtype)

    @contextlib.contextmanager
    def fitting(self, what: str | None = None, advice: str = _SMALLER_BATCHES) -> Iterator[None]:
        """What does not fit in memory, a batch unless ``what`` says something else, becomes an InputError."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = what or f"a batch of {self.batch_size}"
            raise InputError(f"{what} does not fit in the memory of {self.options.device}: {advice}") from None

    def _take_real(self) -> None:
        """Before anything is trained: what is wrong with these images is found before time is spent."""
        with timed(self.seconds, "FID_real"):
            self.pictures.fid.add_real(
                strict=self.options.strict,
                looking=lambda done, total: self.progress("looking at images for FID", done, total),
                progress=lambda done, total: self.progress("FID, real images", done, total),
            )

    def _take_pictures(self, when: str) -> None:
        count = len(self.pictures.labels)
        with timed(self.seconds, f"sampling_{when}"), self.fitting(f"sampling {count} pictures", "lower --samples"):
            self.pictures.take(when, lambda done, total: self.progress(f"sampling {when}", done, total))

    @property
    def encodes(self) -> bool:
        """Whether images become latents before they are used."""
        return self.pretrained.vae is not None and self.data.kind == "pixel_values"

    def _verify(self) -> None:
        """Reads every sample that will be used, and draws others for those that cannot be read."""

        def read(draw: Draw) -> None:
            self.data.verify(
                draw.indices.tolist(),
                strict=self.options.strict,
                progress=lambda done, total: self.progress("looking at the data", done, total),
            )

        with timed(self.seconds, "decoding"):
            self.draw = until_readable(self.data, self._draw, read)

    def _encode(self, directory: Path) -> LatentData:
        """The latents of every image that will be used, each decoded and encoded once; others for unreadable ones."""
        latents: LatentData

        def read(draw: Draw) -> None:
            nonlocal latents
            latents = encode_latents(
                self.data,
                draw.indices,
                self.pretrained.vae,
                directory,
                skip_unreadable=True,
                progress=lambda done, total: self.progress("encoding latents", done, total),
            )

        with timed(self.seconds, "encoding"):
            self.draw = until_readable(self.data, self._draw, read)
        return latents

    def _loaders(self, data: ImageData | LatentData) -> Iterator[DataLoader]:
        for name in ("forget", "retain"):
            batches: Tensor = getattr(self.draw, name)
            dataset: Dataset = data
            if name == "forget" and self.draw.replace is not None:
                dataset, batches = WithReplacements(data), torch.stack([batches, self.draw.replace], dim=-1)
            if isinstance(data, LatentData):
                batches = data.positions(batches)
            yield DataLoader(dataset, batch_sampler=_Fixed(batches), collate_fn=self.collate(name == "forget"))

    def _identity(self) -> dict[str, str]:
        """Of the forget set, for a mask's metadata."""
        found = {
            "forget_classes": ",".join(map(str, sorted(self.forget_classes))),
            "forget_data": self.data.sha256,
        }
        if self.concepts is not None:
            prompts = [*(self.concepts.prompts[i] for i in self.forget_classes), self.concepts.replacement]
            found["forget_prompts"] = json.dumps(prompts)
        return found

    def _take_averages(self, result: Result) -> None:
        with torch.no_grad():
            for name, p in trainable(self.model).items():
                local(p).copy_(local(result.ema[name]))

    def _ema_decay(self) -> float | None:
        if self.options.save_weights == "last":
            return None
        decay = self.domain["run"]["ema_decay"] if self.options.ema_decay is None else self.options.ema_decay
        if decay is None:
            raise InputError(f"--save-weights ema needs --ema-decay: the preset {self.preset} keeps no averages")
        return decay


class _Fixed:
    """Batches that were drawn before; the same at every pass."""

    def __init__(self, batches: Tensor):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return iter(self.batches.tolist())
