"""Small diffusers denoisers and batches for tests of the diffusion tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

CLASSES = 4


def scheduler(prediction_type: str = "epsilon", steps: int = 10) -> DDPMScheduler:
    """Few steps, so that every one of them is drawn, the first too."""
    return DDPMScheduler(num_train_timesteps=steps, beta_end=0.3, prediction_type=prediction_type)


def unet(classes: int | None = CLASSES + 1, channels: int = 1, dropout: float = 0.0, seed: int = 0) -> UNet2DModel:
    """The last of ``classes`` label embeddings is the null label."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
        dropout=dropout,
    )


def dit(layers: int = 2, learned: bool = True, seed: int = 0) -> DiTTransformer2DModel:
    """Its blocks start with equal embedders, as the released one's do."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4 if learned else 2,
        num_layers=layers,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=2,
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def text_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
    )


def text_encoder(folder: Path) -> tuple[nn.Module, Any]:
    """A small CLIP text encoder of the text UNet's width, and a tokenizer of single letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8, local_files_only=True)
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            attention_dropout=0.5,
        )
    )
    return encoder.train(), tokenizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count: int, seed: int = 0, channels: int = 1) -> Tensor:
    return normal(count, channels, 8, 8, seed=seed).clamp(-1, 1)


def labels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
