"""Makes a small class-conditional diffusion UNet of digits forget a class, by leading it to another one.

    python examples/diffusion_class.py

The network is built from a configuration and barely trained, so that this takes seconds. For a diffusers folder
of yours use `unlearn-ext forget`; `unlearn-ext demo ddpm` shows pictures.
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel

from unlearn_ext import Unlearner
from unlearn_ext.data import load_digits
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import ClassConditionalDiffusion

FORGOTTEN, REPLACEMENT, NO_LABEL = 3, 8, 10

torch.manual_seed(0)
digits = load_digits()
images, labels = digits.pixels(16)[::10], digits.labels[::10]  # [N, 1, 16, 16] in [-1, 1]
model = UNet2DModel(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    num_class_embeds=11,  # ten digits and "no label"
)
scheduler = DDPMScheduler()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(40):
    batch = torch.randint(len(images), (32,))
    noise, times = torch.randn_like(images[batch]), torch.randint(1000, (32,))
    predicted = model(scheduler.add_noise(images[batch], noise, times), times, class_labels=labels[batch]).sample
    optimizer.zero_grad()
    (predicted - noise).square().mean().backward()
    optimizer.step()


def batches(chosen):
    return list(zip(images[chosen].split(16), labels[chosen].split(16), strict=True))


@torch.no_grad()
def distance(label):
    """Between what the network predicts for the label and for its replacement, from the same noise."""
    noisy, times = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.full((16,), 500)
    seen, other = (model(noisy, times, class_labels=torch.full((16,), x)).sample for x in (label, REPLACEMENT))
    return (seen - other).square().mean().item()


before = distance(FORGOTTEN)
task = ClassConditionalDiffusion(scheduler, null_label=NO_LABEL, replace_label=REPLACEMENT)
method = SFRon(
    rule="adam",
    lr=1e-3,
    iterations=30,
    forget_term="replace",
    param_groups={"class_embedding.*": {"forget_lr": 0.1}},  # the label's own row, which no retained digit reads
)
result = Unlearner(model, task, method).run(batches(labels == FORGOTTEN), batches(labels != FORGOTTEN))
print(f"distance of {FORGOTTEN} to {REPLACEMENT}: {before:.5f} before, {distance(FORGOTTEN):.5f} after")
print(result)
