"""Text-conditional diffusion: diffusers' UNet2DConditionModel, as in Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.wrappers import unwrapped
from ..errors import InputError
from ._diffusion import Diffusion, check_share
from ._prompts import PromptEncoder

__all__ = ["TextConditionalDiffusion"]


class TextConditionalDiffusion(Diffusion):
    """Denoising of images or latents under prompts.

    Batches are dicts with one of ``pixel_values``, ``latents`` (times ``scaling_factor``), or ``latent_mean`` and
    ``latent_std`` (a draw from them, times ``scaling_factor``), and with ``prompts`` (a list of N texts) or
    ``prompt_embeds`` [N, L, D]. A forget batch may carry what shall stand in its place: ``replace_prompts`` or
    ``replace_prompt_embeds``, and ``replace_pixel_values``, ``replace_latents`` and so on, without which the samples
    stay the same. Prepared batches are dicts of ``inputs``, ``noise``, ``timesteps``, ``prompt_embeds``, ``dropped``
    and, where there are any, ``null_embeds``, ``replace_embeds`` and ``replace_inputs``.

    Args:
        scheduler: a diffusers scheduler, for its noise and what the model predicts (noise, v or the sample).
        text_encoder, tokenizer: for prompts given as text; each text is encoded once.
        prompt_dropout: the probability of a prompt being replaced by the empty one.
        reduction: over a sample's dimensions, ``mean`` or ``sum``.
        guidance: scale of classifier-free guidance in the Fisher losses, s of e_u + s (e_c - e_u); None: no guidance.
        scaling_factor: of latents.
        antithetic: draw timesteps for half of a batch, and take T - 1 - t for the other half.
        null_embeds: the empty prompt's embedding [L, D], where there is no text encoder to make it.
        seed: of the task's generator.
    """

    kind = "text-conditional diffusion"
    _EXPECTED = "a dict with prompts or prompt_embeds and"
    _NO_REPLACEMENT = "a forget batch has no replacement: add replace_prompts or replace_prompt_embeds"

    def __init__(
        self,
        scheduler: Any,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        prompt_dropout: float = 0.1,
        reduction: str = "mean",
        guidance: float | None = None,
        scaling_factor: float = 1.0,
        antithetic: bool = False,
        null_embeds: Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__(
            scheduler,
            reduction=reduction,
            antithetic=antithetic,
            guidance=guidance,
            scaling_factor=scaling_factor,
            variational=False,
            seed=seed,
        )
        check_share("prompt_dropout", prompt_dropout)
        if (text_encoder is None) != (tokenizer is None):
            raise InputError("text_encoder and tokenizer belong together: give both or neither")
        self.prompt_dropout = float(prompt_dropout)
        self.encoder = None if text_encoder is None else PromptEncoder(text_encoder, tokenizer)
        if null_embeds is not None and null_embeds.dim() == 3 and null_embeds.shape[0] == 1:
            null_embeds = null_embeds[0]
        if null_embeds is not None and null_embeds.dim() != 2:
            raise InputError(f"null_embeds: expected shape [L, D], got {list(null_embeds.shape)}")
        self.null_embeds = null_embeds
        if self._needs_null and null_embeds is None and self.encoder is None:
            raise InputError(
                "prompt_dropout and guidance need the empty prompt: give text_encoder and tokenizer, or null_embeds, "
                "or set prompt_dropout=0 and guidance=None"
            )
        self._width: int | None = None  # of the model's prompt embeddings, since begin()

    @property
    def _needs_null(self) -> bool:
        return self.prompt_dropout > 0 or self.guidance is not None

    # --- Raw batches ----------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        kind = type(unwrapped(model)).__name__
        if config and config.get("cross_attention_dim") is None:
            raise InputError(f"the model, a {kind}, takes no prompts: use ClassConditionalDiffusion, or another model")
        if config.get("addition_embed_type") is not None:
            raise InputError(
                f"the model wants {config['addition_embed_type']} conditions beside the prompt, as Stable Diffusion XL "
                "does: use one of Stable Diffusion 1 or 2"
            )
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
        self._width = width if isinstance(width, int) else None

    def check(self, batch: Any) -> None:
        samples = self._samples(batch)
        self._check_samples(samples)
        count = samples.values.shape[0]
        if self._find_prompts(batch, "", count) is None:
            raise InputError("a batch has no prompts: add a list of N texts as prompts, or prompt_embeds [N, L, D]")
        prompts = self._find_prompts(batch, "replace_", count)
        replace = self._find_samples(batch, "replace_")
        if replace is not None:
            if prompts is None:
                raise InputError("a batch has replacements without their prompts: add replace_prompts")
            self._check_samples(replace)
            if replace.values.shape != samples.values.shape:
                raise InputError(
                    f"the replacement has shape {list(replace.values.shape)} and the batch "
                    f"{list(samples.values.shape)}: they must match"
                )

    def _find_prompts(self, batch: Mapping[str, Any], prefix: str, count: int) -> list[str] | Tensor | None:
        texts, embeds = batch.get(prefix + "prompts"), batch.get(prefix + "prompt_embeds")
        if texts is not None and embeds is not None:
            raise InputError(f"a batch has {prefix}prompts and {prefix}prompt_embeds: give one of them")
        if texts is not None:
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{prefix}prompts: expected a list of N texts, got {type(texts).__name__}")
            if self.encoder is None:
                raise InputError(f"{prefix}prompts need text_encoder and tokenizer: give the task both")
        elif embeds is not None:
            if not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.is_floating_point():
                got = f"shape {list(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
                raise InputError(f"{prefix}prompt_embeds: expected floating-point numbers [N, L, D], got {got}")
            if self._width is not None and embeds.shape[2] != self._width:
                raise InputError(
                    f"{prefix}prompt_embeds have width {embeds.shape[2]} and the model takes {self._width}: use its "
                    "own text encoder"
                )
        found = texts if texts is not None else embeds
        if found is not None and len(found) != count:
            raise InputError(f"a batch has {count} samples and {len(found)} {prefix}prompts: they must match")
        return found

    def _has_replacement(self, batch: Mapping[str, Any]) -> bool:
        names = ("replace_prompts", "replace_prompt_embeds", "replace_embeds")
        return any(batch.get(name) is not None for name in names)

    # --- Prepared batches -----------------------------------------------------------------------------------

    def prepare(self, batch: Any, device: torch.device) -> dict[str, Tensor]:
        self.check(batch)
        inputs = self._draw_inputs(self._samples(batch), device)
        replace = self._find_samples(batch, "replace_")
        replace_inputs = None if replace is None else self._draw_inputs(replace, device)
        count = inputs.shape[0]
        prepared = self._draw_noise(inputs, device)
        prepared["prompt_embeds"] = self._embed(batch, "", count, device)
        prepared["dropped"] = self._draw_drops(count, self.prompt_dropout).to(device, non_blocking=True)
        if self._needs_null:
            null = self.encoder([""])[0] if self.null_embeds is None else self.null_embeds
            if null.shape != prepared["prompt_embeds"].shape[1:]:
                raise InputError(
                    f"the empty prompt has embeddings of shape {list(null.shape)} and the batch's prompts "
                    f"{list(prepared['prompt_embeds'].shape[1:])}: make both with one text encoder"
                )
            prepared["null_embeds"] = self._move(null, device).expand_as(prepared["prompt_embeds"])
        if (embeds := self._embed(batch, "replace_", count, device)) is not None:
            prepared["replace_embeds"] = embeds
            if replace_inputs is not None:
                prepared["replace_inputs"] = replace_inputs
        return prepared

    def _embed(self, batch: Mapping[str, Any], prefix: str, count: int, device: torch.device) -> Tensor | None:
        prompts = self._find_prompts(batch, prefix, count)
        if prompts is None:
            return None
        if not isinstance(prompts, Tensor):
            prompts = self.encoder(prompts)
            if self._width is not None and prompts.shape[2] != self._width:
                raise InputError(
                    f"the text encoder's embeddings have width {prompts.shape[2]} and the model takes {self._width}: "
                    "use its own text encoder"
                )
        return self._move(prompts, device)

    # --- Losses ---------------------------------------------------------------------------------------------

    def _conditions(self, batch: Mapping[str, Tensor], which: str) -> Tensor:
        if which == "dropped" and "null_embeds" in batch:
            return torch.where(batch["dropped"].reshape(-1, 1, 1), batch["null_embeds"], batch["prompt_embeds"])
        if which == "null" and "null_embeds" not in batch:
            raise InputError(
                "the empty prompt is not known: give the task a guidance or a prompt_dropout above 0, with a text "
                "encoder or null_embeds"
            )
        return batch[{"dropped": "prompt_embeds", "full": "prompt_embeds"}.get(which, f"{which}_embeds")]

    def _call(self, model: Any, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Any:
        return model(noisy, timesteps, encoder_hidden_states=condition.to(noisy.dtype))
