"""What a run of ``unlearn-ext forget`` will take, from trials of single batches with made-up inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.latents import ENCODED_AT_ONCE, encode_batch
from ..distributed.modes import keeping_modes
from ..evaluation.inception import PICTURES_AT_ONCE
from ..models.judge import JUDGED_AT_ONCE
from ..models.sampling import DECODED_AT_ONCE, SAMPLED_AT_ONCE, decode
from ..run.first_pass import KEPT
from .estimate import Estimate, Trials, Workload, estimate
from .prompts import WithReplacements
from .trial import Trial, try_batch, try_samples

if TYPE_CHECKING:
    from .job import ForgetJob

__all__ = ["estimate_run", "other_networks"]

_DECODED_FOR_TRIAL = 4  # pictures of the drawn ones


def estimate_run(job: ForgetJob) -> Estimate:
    """Memory by stage and part, time and disk: exact sizes, and one batch of each kind that is tried."""
    others, fid = other_networks(job), job.pictures.fid
    with _undisturbed(job, others):
        runner = _TrialRunner(job, others)
        trials = runner.all()
    used = len(job.draw.indices)
    kept = 0 if job.encodes and not job.options.strict else used  # of pictures that become latents, none is
    work = Workload(
        read=used,
        held=job.data.held_bytes(kept + (0 if fid is None else fid.planned)),
        sampled=len(job.pictures.labels),
        steps=job.options.num_inference_steps,
        shape=job.pretrained.image_shape,
        latent_shape=job.pretrained.latent_shape,
        fisher_batches=sum(job.fisher_batches),
        waiting=min(KEPT, len(job.draw.retain)) * runner.batch_bytes(),
        accumulation=job.options.gradient_accumulation_steps,
        ema=job.ema_decay is not None,
        in_backward=job.unlearner.optimizer_in_backward,
        fisher_storage=job.options.fisher_storage,
        checkpoints=job.checkpoints_at_once() > 0,
        real=0 if fid is None else fid.planned,
        generated=0 if fid is None else fid.generated,
        features=0 if fid is None else fid.inception.features,
    )
    return estimate(job.model, others, job.method, trials, work, job.disk)


def other_networks(job: ForgetJob) -> list[nn.Module]:
    """Networks that are in memory beside the denoiser."""
    found = [job.pretrained.vae, job.pretrained.text_encoder]
    if job.pictures.judge is not None:
        found.append(job.pictures.judge.model)
    if job.pictures.fid is not None:
        found.append(job.pictures.fid.inception.network)
    return [network for network in found if network is not None]


@contextlib.contextmanager
def _undisturbed(job: ForgetJob, others: list[nn.Module]) -> Iterator[None]:
    """Random numbers and modes are afterwards as before, and there are no gradients."""
    state = rng.capture({"task": job.task.generators()})
    try:
        with contextlib.ExitStack() as modes:
            for network in (job.model, *others):
                modes.enter_context(keeping_modes(network))
            yield
    finally:
        rng.restore(state, {"task": job.task.generators()})
        for p in job.model.parameters():  # a trial that fails may leave some
            p.grad = None


class _TrialRunner:
    def __init__(self, job: ForgetJob, others: list[nn.Module]):
        self.job, self.others = job, others
        self.device = next(job.model.parameters()).device

    def all(self) -> Trials:
        job, found = self.job, {}
        pictures, pretrained, task = job.pictures, job.pretrained, job.task
        used, shown = len(job.draw.indices), len(pictures.labels)
        if job.data.kind == "pixel_values":
            spaced = range(0, used, -(-used // _DECODED_FOR_TRIAL))
            found["read_seconds"] = job.data.seconds_each(job.draw.indices[list(spaced)].tolist())
        if job.encodes:
            found["encode"] = self._samples(
                lambda n: encode_batch(pretrained.vae, torch.zeros(n, *pretrained.image_shape), range(n)),
                min(used, ENCODED_AT_ONCE),
            )
        with job.in_float32():
            found["sample"] = self._samples(lambda n: pictures.sample(n, steps=1), min(shown, SAMPLED_AT_ONCE))
        if pretrained.vae is not None:
            found["decode"] = self._samples(
                lambda n: decode(pretrained.vae, torch.zeros(n, *pretrained.latent_shape)),
                min(shown, DECODED_AT_ONCE),
            )
        if pictures.judge is not None:
            found["judge"] = self._samples(
                lambda n: pictures.judge.probabilities(torch.zeros(n, *pretrained.image_shape)),
                min(shown, JUDGED_AT_ONCE),
            )
        if pictures.fid is not None:
            found["features"] = self._samples(
                lambda n: pictures.fid.inception.extract(torch.zeros(n, *pretrained.image_shape)),
                min(pictures.fid.planned, PICTURES_AT_ONCE),
            )
        unlearner, steps = job.unlearner, job.options.gradient_accumulation_steps
        if job.method.needs_fisher:
            job.model.eval()
            found["fisher"] = self._batch(
                task.fisher_losses, unlearner.fisher_autocast, clipped=job.method.fisher_max_norm is not None
            )
        job.model.train()
        clips = job.method.max_norm is not None, job.method.retain_max_norm is not None
        found["retain"] = found["forget"] = self._batch(
            task.losses, unlearner.autocast, batches=steps, clipped=clips[1]
        )
        if job.method.replaces or (unlearner.optimizer_in_backward and clips[0] != clips[1]):
            losses = task.replacement_losses if job.method.replaces else task.losses
            found["forget"] = self._batch(
                losses, unlearner.autocast, forget=job.method.replaces, batches=steps, clipped=clips[0]
            )
        return Trials(**found)

    def _samples(self, run: Callable[[int], Any], count: int) -> Trial:
        return try_samples(run, count, self.job.model, self.others)

    def _batch(
        self,
        losses: Callable[..., Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager],
        *,
        forget: bool = False,
        batches: int = 1,
        clipped: bool = False,
    ) -> Trial:
        job, batch = self.job, self._made_up_batch(forget)
        job.task.begin(job.model, batch)

        def loss() -> Tensor:
            prepared = job.task.prepare(batch, self.device)
            with autocast():
                return losses(job.model, prepared).mean()

        with job.fitting():
            passes = (1 + clipped) if job.unlearner.optimizer_in_backward else 0
            return try_batch(job.model, loss, self.others, batches=batches, passes_in_backward=passes)

    def batch_bytes(self) -> int:
        return sum(value.nbytes for value in self._made_up_batch(forget=False).values() if isinstance(value, Tensor))

    def _made_up_batch(self, forget: bool) -> dict[str, Any]:
        """As a loader gives it."""
        job = self.job
        if job.data.kind == "pixel_values" and not job.encodes:
            kinds = ["pixel_values"]
        else:
            kinds = ["latents"] if job.data.kind == "latents" else ["latent_mean", "latent_std"]
        sample = dict.fromkeys(kinds, torch.zeros(job.pretrained.latent_shape))
        sample["labels"] = torch.tensor(job.forget_classes[0])
        if forget and job.draw.replace is not None:
            sample = WithReplacements([sample])[0, 0]
        return job.collate(forget)([sample] * job.batch_size)
