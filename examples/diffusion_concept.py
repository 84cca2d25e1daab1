"""Makes a small text-to-image UNet forget a prompt: it learns to answer it as it answers another one.

    python examples/diffusion_concept.py

Networks are built from configurations, and prompts are random embeddings, so that nothing is downloaded and this takes
seconds. For Stable Diffusion pass `text_encoder` and `tokenizer` to the task and texts as `prompts`, or use
`unlearn-ext forget --forget-prompt ... --replace-prompt ...`.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from unlearn_ext import Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.models.weights import select_trained
from unlearn_ext.tasks import TextConditionalDiffusion

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=4,
    norm_num_groups=4,
)
nothing, unwanted, wanted, others = (torch.randn(8, 16) for _ in range(4))  # prompts: 8 tokens of width 16


def batches(count, prompt, replacement=None):
    """Latents with their prompt; a forget batch also says what shall stand in its place."""
    made = []
    for _ in range(count):
        batch = {"latents": torch.randn(8, 4, 8, 8), "prompt_embeds": prompt.expand(8, -1, -1)}
        if replacement is not None:
            batch["replace_prompt_embeds"] = replacement.expand(8, -1, -1)
        made.append(batch)
    return made


@torch.no_grad()
def distance():
    """Between what the network predicts for the unwanted prompt and for the wanted one."""
    noisy = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = (unet(noisy, 500, prompt.expand(8, -1, -1)).sample for prompt in (unwanted, wanted))
    return (first - second).square().mean().item()


before = distance()
print("trained weights:", len(select_trained(unet, "cross-attention")), "of", len(list(unet.parameters())), "tensors")
task = TextConditionalDiffusion(DDPMScheduler(), null_embeds=nothing)
method = SFRon(rule="adam", lr=3e-3, iterations=30, forget_term="replace", gamma=None)
result = Unlearner(unet, task, method).run(batches(4, unwanted, wanted), batches(4, others))
print(f"distance of the unwanted prompt to the wanted one: {before:.6f} before, {distance():.6f} after")
print(result)
