"""Small diffusers pipelines built from configurations, and real digits as pictures: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import shared_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def small_vae(channels: int = 3, seed: int = 0):
    """An AutoencoderKL that halves each side: 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


def small_dit(
    classes: int = 10,
    seed: int = 0,
    *,
    in_channels: int = 4,
    sample_size: int = 8,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 8,
):
    """A DiT with learned variance, whose embedder copies are equal."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=2 * in_channels,
        num_layers=layers,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=classes,
        attention_bias=True,
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:  # equal copies, as released weights have them
        block.norm1.emb.load_state_dict(first)
    return model.eval()


def small_unet(classes: int | None = 10, seed: int = 0, *, channels: int = 1, sample_size: int = 16):
    """A class-conditional UNet2DModel of ``classes`` and a null class."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=None if classes is None else classes + 1,
    ).eval()


def small_text_unet(seed: int = 0):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
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
    ).eval()


def save_tokenizer(folder: Path, words: Sequence[str] = NAMES) -> Path:
    """A CLIP tokenizer that knows letters and these words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts[:2] = ["".join(parts[:2])]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def small_tokenizer(folder: Path, length: int = 8):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(save_tokenizer(folder), model_max_length=length, local_files_only=True)


def small_text_encoder(tokenizer, seed: int = 0):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def save_dit_pipeline(folder: Path, *, names: Sequence[str] | None = NAMES, classes: int = 10, seed: int = 0) -> Path:
    """A DiTPipeline with a VAE; ``names`` become the label texts of its model_index.json, as DiT-XL/2's has them."""
    from diffusers import DDIMScheduler, DiTPipeline

    DiTPipeline(small_dit(classes, seed), small_vae(), DDIMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    if names is not None:
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {str(i): name for i, name in enumerate(names)}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def save_ddpm_pipeline(folder: Path, *, classes: int | None = 10, seed: int = 0) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(small_unet(classes, seed), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


def save_model_and_scheduler(folder: Path, *, seed: int = 0, subfolder: str = "") -> Path:
    """A class-conditional UNet2DModel with a scheduler folder beside it, and no model_index.json."""
    from diffusers import DDPMScheduler

    small_unet(seed=seed).save_pretrained(folder / subfolder)
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "scheduler")
    return folder


def save_text_pipeline(folder: Path, *, seed: int = 0) -> Path:
    import tempfile

    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = small_tokenizer(Path(scratch))
    StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=small_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=small_text_unet(seed),
        scheduler=DDIMScheduler(num_train_timesteps=50, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, names: Sequence[str] = NAMES, *, seed: int = 0, **changes: int):
    """A transformers image classifier of 16×16 pictures with its image processor; ``changes`` to its configuration."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    texts = dict(enumerate(names))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 16, "patch_size": 8, "num_channels": 3, **changes}
    config = ViTConfig(**sizes, id2label=texts, label2id={name: i for i, name in texts.items()})
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def save_digit_folders(
    folder: Path, per_class: int = 6, *, digits: Sequence[int] = range(10), names: Sequence[str] | None = None
) -> Path:
    """Real digits as 28×28 PNG, ``per_class`` in each folder; folders carry the digit or its name."""
    from PIL import Image

    from unlearn_ext.data import digits as package

    mnist = shared_digits.digits()
    pixels = (mnist.images * package.STD + package.MEAN).mul(255).round().to(torch.uint8)
    for digit in digits:
        home = folder / (str(digit) if names is None else names[digit])
        home.mkdir(parents=True)
        for i, index in enumerate((mnist.labels == digit).nonzero().flatten()[:per_class].tolist()):
            Image.fromarray(pixels[index, 0].numpy()).save(home / f"{i:03}.png")
    return folder
