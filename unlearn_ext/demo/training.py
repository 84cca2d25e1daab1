"""Ordinary training of a classifier, for the original and the retrained model alike."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.modes import PRECISIONS
from ..errors import InputError, NonFiniteError
from ..utils.arguments import check_choice


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    mixed_precision: str = "no",
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train ``model`` in place: SGD, Nesterov momentum 0.9, weight decay 5e-4, one-cycle learning rate.

    The order of the samples comes from a generator of its own, so on the CPU the same arguments, initial
    weights and number of threads give the same weights. A last batch that is not full is left out, each epoch
    another one: batch normalisation over a handful of samples only adds noise.

    Args:
        model: maps images ``[B, ...]`` to logits ``[B, K]``; moved to ``device``, left in eval mode.
        images: ``[N, ...]``, floating.
        labels: int64 ``[N]``.
        epochs: passes over the samples.
        batch_size: samples a step.
        lr: the learning rate's peak; it rises over the first 30 % of the steps and falls to zero after.
        seed: of the order of the samples.
        mixed_precision: ``"no"``, ``"bf16"``, or ``"fp16"`` (with loss scaling, on an accelerator only).
        device: where to train.
        progress: called after each step with the steps done and the steps in all.

    Returns:
        ``model`` itself.

    Raises:
        InputError: on empty or mismatched data, non-positive sizes, or an unsupported precision.
        NonFiniteError: when the loss stopped being finite.
    """
    device = torch.device(device)
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(f"labels: expected one for each of at least one image, got {len(labels)} for {len(images)}")
    if epochs < 1 or batch_size < 1:
        raise InputError(f"expected epochs and batch_size of at least 1, got {epochs} and {batch_size}")
    check_choice("mixed_precision", mixed_precision, PRECISIONS)
    if mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("mixed_precision: fp16 needs an accelerator; use 'no' or 'bf16' on the CPU")
    dtype = PRECISIONS[mixed_precision]

    model.to(device).train()
    images, labels = images.to(device), labels.to(device)
    batch_size = min(batch_size, len(images))
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, cycle_momentum=False)
    scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")
    generator = torch.Generator().manual_seed(seed)

    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(device)
        for batch in order.split(batch_size):
            if len(batch) < batch_size:
                continue
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps)
        if not torch.isfinite(loss):  # once an epoch: reading it waits for the device
            raise NonFiniteError(f"training diverged: the loss is {loss.item()} after step {done}; lower lr")
    return model.eval()
