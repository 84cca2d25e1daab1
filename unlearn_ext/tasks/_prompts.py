"""Prompts as the embeddings that a denoiser is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.modes import evaluating
from ..errors import InputError
from .batches import refusing

__all__ = ["PromptEncoder"]


class PromptEncoder:
    """Encodes each text once, as diffusers' StableDiffusionPipeline does, and keeps its embedding on the CPU.

    Args:
        text_encoder: a transformers text model, in the state in which it is to be used.
        tokenizer: its tokenizer.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any):
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [N, L, D]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Tensor:
        encoder = self.text_encoder
        config = getattr(encoder, "config", None)
        length = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 1 << 20))
        if length > 1 << 16:
            raise InputError("the tokenizer has no model_max_length: set it to the text encoder's number of positions")
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt in prompts:
            if len(self.tokenizer(prompt).input_ids) > length:
                warnings.warn(f"the prompt {prompt!r} is longer than {length} tokens and is cut", stacklevel=2)
        device = next(encoder.parameters()).device
        arguments = {"attention_mask": None}
        if getattr(config, "use_attention_mask", False):
            arguments["attention_mask"] = tokens.attention_mask.to(device)
        with evaluating(encoder), torch.no_grad(), refusing(encoder, {"input_ids": tokens.input_ids}):
            return encoder(tokens.input_ids.to(device), **arguments)[0].cpu()
