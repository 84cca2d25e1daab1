"""Networks for digits of 16 × 16 pixels, as diffusers and transformers build them from a configuration.

Each takes pixels in [−1, 1], 1,000 timesteps and labels 0 to 9, or ``NULL_LABEL`` for none, and predicts the noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.digits import CLASSES
from ..network import SmallResNet

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CAPTIONS",
    "DENOISERS",
    "NULL_LABEL",
    "SIZE",
    "Denoiser",
    "Judge",
    "build_denoiser",
    "build_tokenizer",
    "noise_scheduler",
    "sampling_scheduler",
]

SIZE = 16  # pixels of a side
NULL_LABEL = CLASSES
CAPTIONS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "")  # by label
DENOISERS = ("ddpm", "dit", "text")
TIMESTEPS = 1000
_TOKENS = ("<pad>", "<start>", "<end>", "<unknown>", *CAPTIONS[:-1])
_CAPTION_LENGTH = 4  # tokens: the start, at most two words, the end


@dataclass
class Denoiser:
    """A network that predicts the noise, and what turns a label into its input.

    Attributes:
        name: ``"ddpm"`` (UNet2DModel), ``"dit"`` (DiTTransformer2DModel), or ``"text"`` (UNet2DConditionModel).
        model: the network.
        text_encoder, tokenizer: of ``"text"``, which knows a label by its caption.
    """

    name: str
    model: nn.Module
    text_encoder: nn.Module | None = None
    tokenizer: PreTrainedTokenizerFast | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold weights, by the names that diffusers' pipelines give them."""
        if self.name == "text":
            return {"unet": self.model, "text_encoder": self.text_encoder}
        return {"transformer" if self.name == "dit" else "unet": self.model}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight once, tied ones too."""
        for module in self.modules.values():
            yield from module.parameters()

    def train(self, mode: bool = True) -> Denoiser:
        """Sets the mode, but for a DiT's label embedders: each would drop labels in train mode, block by block."""
        for module in self.modules.values():
            module.train(mode)
        if self.name == "dit":
            for block in self.model.transformer_blocks:
                block.norm1.emb.class_embedder.eval()
        return self

    def eval(self) -> Denoiser:
        return self.train(False)

    def embed(self, captions: list[str]) -> Tensor:
        """The text encoder's states ``[n, tokens, width]``."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids).last_hidden_state

    def __call__(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The predicted noise ``[N, 1, 16, 16]`` for integer timesteps ``[N]`` and labels ``[N]``."""
        if self.name == "text":
            states = self.embed(list(CAPTIONS))[labels]
            return self.model(noisy, timesteps, encoder_hidden_states=states).sample
        return self.model(noisy, timesteps, class_labels=labels).sample


class Judge(SmallResNet):
    """A classifier of digits that never saw a generated one; ``features`` ``[N, 64]`` are what its last layer reads.

    Takes pixels ``[N, 1, 16, 16]`` in [−1, 1].
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(widths=(16, 32, 64), seed=seed)

    def features(self, images: Tensor) -> Tensor:
        images = nn.functional.interpolate(images, scale_factor=2)  # the stem halves the resolution
        return self.stages(self.stem(images)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def noise_scheduler() -> DDPMScheduler:
    """The noise that the networks are trained on: 1,000 timesteps, β linear from 1e-4 to 0.02 (arXiv 2006.11239).

    Samplers made from its configuration do not clip what they take the clean picture to be: diffusers' DDIM would
    clip that and keep the noise as predicted, which together are no longer the noisy picture, and under guidance the
    error grows with every step. ``trailing``: the first step starts from pure noise however few steps there are.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=TIMESTEPS, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
    )


def sampling_scheduler() -> DDIMScheduler:
    """DDIM over the same noise (arXiv 2010.02502)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(noise_scheduler().config)


def build_denoiser(name: str, seed: int | None = None) -> Denoiser:
    """A denoiser with initial weights.

    Args:
        name: one of ``DENOISERS``.
        seed: of the weights; the global generator is left alone. ``None`` draws from the global one.
    """
    with _seeded(seed):
        return {"ddpm": _ddpm, "dit": _dit, "text": _text}[name]()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: zero to nine. Every caption takes four tokens, padding included."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, ids[token]) for token in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_CAPTION_LENGTH,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    )


# --- Each of them ---------------------------------------------------------------------------------------------

_UNET: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
}


def _ddpm() -> Denoiser:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        **_UNET,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        attention_head_dim=32,  # channels of a head of the middle block
        num_class_embeds=CLASSES + 1,
    )
    return Denoiser("ddpm", model)


def _dit() -> Denoiser:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=4,
        in_channels=1,
        sample_size=SIZE,
        patch_size=2,
        norm_num_groups=8,
        num_embeds_ada_norm=CLASSES,
    )
    for module in model.modules():  # as the paper begins (arXiv 2212.09748): every block is the identity at first
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:  # equal copies, as in the paper, which has one for all
        block.norm1.emb.load_state_dict(first)
    return Denoiser("dit", model)


def _text() -> Denoiser:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 64
    tokenizer = build_tokenizer()
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_TOKENS),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=_CAPTION_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # heads
        cross_attention_dim=width,
    )
    return Denoiser("text", model, encoder, tokenizer)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
        yield
