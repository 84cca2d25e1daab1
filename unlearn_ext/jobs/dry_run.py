"""What a run of ``unlearn-ext forget`` will take, from trials of single batches with made-up inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.latents import ENCODED_AT_ONCE, encode_batch
from ..distributed.modes import keeping_modes
from ..errors import InputError
from ..evaluation.inception import PICTURES_AT_ONCE
from ..models.judge import JUDGED_AT_ONCE
from ..models.sampling import DECODED_AT_ONCE, SAMPLED_AT_ONCE, decode
from ..run.first_pass import KEPT
from .estimate import Estimate, Trials, Workload, estimate
from .parallel import world_size
from .plan import ForgetPlan
from .precision import widen_trained
from .prompts import WithReplacements
from .space import explain_out_of_memory
from .trial import Trial, try_batch, try_samples

__all__ = ["estimate_run", "other_networks"]

_DECODED_FOR_TRIAL = 4  # pictures of the drawn ones


def estimate_run(plan: ForgetPlan) -> Estimate:
    """Memory by stage and part, time and disk: exact sizes, and one batch of each kind that is tried.

    Nothing is written, and the run that may follow is not disturbed.
    """
    if world_size() > 1:
        raise InputError("--dry-run tries batches in one process: run it without torchrun")
    others, fid = other_networks(plan), plan.pictures.fid
    with _undisturbed(plan, others):
        runner = _TrialRunner(plan, others)
        trials = runner.all()
    used = len(plan.draw.indices)
    kept = 0 if plan.encodes and not plan.options.strict else used  # of pictures that become latents, none is
    work = Workload(
        read=used,
        held=plan.data.held_bytes(kept + (0 if fid is None else fid.planned)),
        sampled=len(plan.pictures.labels),
        steps=plan.options.num_inference_steps,
        shape=plan.pretrained.image_shape,
        latent_shape=plan.pretrained.latent_shape,
        fisher_batches=sum(plan.fisher_batches),
        waiting=min(KEPT, len(plan.draw.retain)) * runner.batch_bytes(),
        accumulation=plan.options.gradient_accumulation_steps,
        ema=plan.ema_decay is not None,
        in_backward=plan.unlearner.optimizer_in_backward,
        fisher_storage=plan.options.fisher_storage,
        checkpoints=plan.checkpoints_at_once() > 0,
        real=0 if fid is None else fid.planned,
        generated=0 if fid is None else fid.generated,
        features=0 if fid is None else fid.inception.features,
    )
    return estimate(plan.model, others, plan.method, trials, work, plan.disk)


def other_networks(plan: ForgetPlan) -> list[nn.Module]:
    """Networks that are in memory beside the denoiser."""
    networks = [plan.pretrained.vae, plan.pretrained.text_encoder]
    if plan.pictures.judge is not None:
        networks.append(plan.pictures.judge.model)
    if plan.pictures.fid is not None:
        networks.append(plan.pictures.fid.inception.network)
    return [network for network in networks if network is not None]


@contextlib.contextmanager
def _undisturbed(plan: ForgetPlan, others: list[nn.Module]) -> Iterator[None]:
    """Random numbers and modes are afterwards as before, and there are no gradients."""
    state = rng.capture({"task": plan.task.generators()})
    try:
        with contextlib.ExitStack() as modes:
            for network in (plan.model, *others):
                modes.enter_context(keeping_modes(network))
            yield
    finally:
        rng.restore(state, {"task": plan.task.generators()})
        for p in plan.model.parameters():  # a trial that fails may leave some
            p.grad = None


class _TrialRunner:
    def __init__(self, plan: ForgetPlan, others: list[nn.Module]):
        self.plan, self.others = plan, others
        self.device = next(plan.model.parameters()).device

    def all(self) -> Trials:
        plan, trials = self.plan, {}
        pictures, pretrained, task = plan.pictures, plan.pretrained, plan.task
        used, shown = len(plan.draw.indices), len(pictures.labels)
        if plan.data.kind == "pixel_values":
            spaced = range(0, used, -(-used // _DECODED_FOR_TRIAL))
            trials["read_seconds"] = plan.data.seconds_each(plan.draw.indices[list(spaced)].tolist())
        if plan.encodes:
            trials["encode"] = self._samples(
                lambda n: encode_batch(pretrained.vae, torch.zeros(n, *pretrained.image_shape), range(n)),
                min(used, ENCODED_AT_ONCE),
            )
        with widen_trained(plan.model, plan.in_bfloat16):
            trials["sample"] = self._samples(lambda n: pictures.sample(n, steps=1), min(shown, SAMPLED_AT_ONCE))
        if pretrained.vae is not None:
            trials["decode"] = self._samples(
                lambda n: decode(pretrained.vae, torch.zeros(n, *pretrained.latent_shape)),
                min(shown, DECODED_AT_ONCE),
            )
        if pictures.judge is not None:
            trials["judge"] = self._samples(
                lambda n: pictures.judge.probabilities(torch.zeros(n, *pretrained.image_shape)),
                min(shown, JUDGED_AT_ONCE),
            )
        if pictures.fid is not None:
            trials["features"] = self._samples(
                lambda n: pictures.fid.inception.extract(torch.zeros(n, *pretrained.image_shape)),
                min(pictures.fid.planned, PICTURES_AT_ONCE),
            )
        unlearner, steps = plan.unlearner, plan.options.gradient_accumulation_steps
        if plan.method.needs_fisher:
            plan.model.eval()
            trials["fisher"] = self._batch(
                task.fisher_losses, unlearner.context.fisher_autocast, clipped=plan.method.fisher_max_norm is not None
            )
        plan.model.train()
        clips = plan.method.max_norm is not None, plan.method.retain_max_norm is not None
        trials["retain"] = trials["forget"] = self._batch(
            task.losses, unlearner.context.autocast, batches=steps, clipped=clips[1]
        )
        if plan.method.replaces or (unlearner.optimizer_in_backward and clips[0] != clips[1]):
            losses = task.replacement_losses if plan.method.replaces else task.losses
            trials["forget"] = self._batch(
                losses, unlearner.context.autocast, forget=plan.method.replaces, batches=steps, clipped=clips[0]
            )
        return Trials(**trials)

    def _samples(self, run: Callable[[int], Any], count: int) -> Trial:
        return try_samples(run, count, self.plan.model, self.others)

    def _batch(
        self,
        losses: Callable[..., Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager],
        *,
        forget: bool = False,
        batches: int = 1,
        clipped: bool = False,
    ) -> Trial:
        plan, batch = self.plan, self._made_up_batch(forget)
        plan.task.begin(plan.model, batch)

        def loss() -> Tensor:
            prepared = plan.task.prepare(batch, self.device)
            with autocast():
                return losses(plan.model, prepared).mean()

        with explain_out_of_memory(plan.options.device, f"a batch of {plan.batch_size}"):
            passes = (1 + clipped) if plan.unlearner.optimizer_in_backward else 0
            return try_batch(plan.model, loss, self.others, batches=batches, passes_in_backward=passes)

    def batch_bytes(self) -> int:
        return sum(value.nbytes for value in self._made_up_batch(forget=False).values() if isinstance(value, Tensor))

    def _made_up_batch(self, forget: bool) -> dict[str, Any]:
        """As a loader gives it."""
        plan = self.plan
        if plan.data.kind == "pixel_values" and not plan.encodes:
            kinds = ["pixel_values"]
        else:
            kinds = ["latents"] if plan.data.kind == "latents" else ["latent_mean", "latent_std"]
        sample = dict.fromkeys(kinds, torch.zeros(plan.pretrained.latent_shape))
        sample["labels"] = torch.tensor(plan.forget_classes[0])
        if forget and plan.draw.replace is not None:
            sample = WithReplacements([sample])[0, 0]
        return plan.collate(forget)([sample] * plan.batch_size)
