"""What the blocks of a page take for granted: the networks and data of a reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unlearn_ext import SaliencyMask, UnlearnOptimizer
from unlearn_ext.data import load_digits
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification

Names = dict[str, Any]


def network(outputs: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))


def batches(count: int = 4, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = range(count)
    return [(torch.randn(size, 1, 8, 8, generator=generator), (torch.arange(size) + i) % 10) for i in draw]


def loaders() -> Names:
    names = {"forget_loader": batches(seed=1), "retain_loader": batches(seed=2), "held_out_loader": batches(seed=3)}
    return {"model": network(), **names}


# --- Pages ------------------------------------------------------------------------------------------------------


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **sizes))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10))


def trained_on_digits(model: nn.Module, epochs: int) -> Names:
    """A reader's own network, trained, and the data it was trained on."""
    split = load_digits().split(2000, 1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(2000).split(64):
            optimizer.zero_grad()
            output = model(split.train_images[batch])
            cross_entropy(getattr(output, "logits", output), split.train_labels[batch]).backward()
            optimizer.step()
    return {"model": model, "images": split.train_images, "labels": split.train_labels, "split": split}


def optimizer_page() -> Names:
    model, (forget_batch, retain_batch) = network(), batches(2)
    SaliencyMask.from_dict({name: p > 0 for name, p in model.named_parameters()}).save("mask.safetensors")
    names = {"model": model, "forget_batch": forget_batch, "retain_batch": retain_batch, "alpha": 0.1}
    return {**names, "loss_of": lambda net, batch: cross_entropy(net(batch[0]), batch[1])}


def memory_page() -> Names:
    names = optimizer_page()
    return {**names, "optimizer": UnlearnOptimizer(names["model"].named_parameters(), rule="adamw", lr=1e-4)}


def methods_page() -> Names:
    return {**loaders(), "forget_loader": batches(1, seed=1), "retain_loader": batches(12, seed=2)}


def calibration_page() -> Names:
    names = loaders()
    gone = [(inputs, torch.full_like(labels, 3)) for inputs, labels in batches(seed=4)]
    others, unseen = ([(x, y.where(y != 3, 4)) for x, y in batches(seed=seed)] for seed in (5, 6))
    return {**names, "class_loader": gone, "others_loader": others, "unseen_others": unseen}


def masks_page() -> Names:
    names = loaders()
    for p in names["model"].parameters():
        p.grad = torch.randn_like(p)
    torch.save({name: p.grad.abs() > 0.5 for name, p in names["model"].named_parameters()}, "with_0.5.pt")
    return names


def runs_page() -> Names:
    names = loaders()
    method = SFRon(rule="momentum", momentum=0.9, lr=0.01, iterations=20)
    return {**names, "fresh_model": network(), "task": Classification(), "method": method}


def hypergradients_page() -> Names:
    return {"model": network(), **dict(zip(("forget", "retain", "held_out"), batches(3), strict=True))}


def extending_page() -> Names:
    rows = [(inputs, inputs.flatten(1)[:, :2]) for inputs, _ in batches(seed=7)]
    forget_rows, retain_rows = rows[:2], rows[2:]
    images = torch.randn(32, 1, 28, 28)
    dicts = [{"pixel_values": part, "labels": torch.arange(16) % 10} for part in images.split(16)]
    names = {"regressor": network(2), "forget_rows": forget_rows, "retain_rows": retain_rows, "vit": vit()}
    return {**loaders(), **names, "image_batches": dicts[:1], "retained_batches": dicts[1:]}


def diffusion_page() -> Names:
    from diffusers import DDPMScheduler
    from helpers.denoisers import dit

    drawn = [(torch.randn(1, 2, 4, 4), torch.tensor([i % 4])) for i in range(8)]
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18215))
    names = {"transformer": dit(), "scheduler": DDPMScheduler(), "vae": vae}
    return {**names, "forget_loader": drawn[:4], "retain_loader": drawn[4:]}


@contextmanager
def processes_page() -> Iterator[Names]:
    """One rank, as torchrun would start it."""
    from helpers.denoisers import dit, scheduler

    drawn = [(torch.randn(4, 2, 4, 4), torch.arange(4)) for _ in range(4)]
    task, method = ClassConditionalDiffusion(scheduler()), SFRon(rule="adamw", lr=1e-3, iterations=4)
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield {"model": dit(), "task": task, "method": method, "forget_loader": drawn[:2], "retain_loader": drawn[2:]}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


PAGES: dict[str, Callable[[], Names | AbstractContextManager[Names]]] = {
    "README.md": lambda: trained_on_digits(cnn(), 3),
    "docs/quickstart.md": dict,
    "docs/guides/calibration.md": calibration_page,
    "docs/guides/certified.md": dict,
    "docs/guides/diffusion.md": diffusion_page,
    "docs/guides/extending.md": extending_page,
    "docs/guides/hypergradients.md": hypergradients_page,
    "docs/guides/masks.md": masks_page,
    "docs/guides/memory.md": memory_page,
    "docs/guides/methods.md": methods_page,
    "docs/guides/optimizer.md": optimizer_page,
    "docs/guides/processes.md": processes_page,
    "docs/guides/runs.md": runs_page,
    "docs/guides/settings.md": dict,
}


def context(page: Path | str) -> AbstractContextManager[Names]:
    names = PAGES[str(page)]()
    return nullcontext(names) if isinstance(names, dict) else names
