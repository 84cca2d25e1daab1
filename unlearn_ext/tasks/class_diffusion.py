"""Class-conditional diffusion: diffusers' UNet2DModel and DiTTransformer2DModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.wrappers import unwrapped
from ..errors import InputError
from ._diffusion import Diffusion, Samples, check_share
from .classification import are_indices

__all__ = ["ClassConditionalDiffusion"]


class ClassConditionalDiffusion(Diffusion):
    """Denoising of images or latents under class labels.

    Batches are ``(inputs, labels)``, inputs taken as they are, or dicts with ``labels`` and one of ``pixel_values``,
    ``latents`` (times ``scaling_factor``), or ``latent_mean`` and ``latent_std`` (a draw from them, times
    ``scaling_factor``); images are [N, C, H, W] in [-1, 1]. A forget batch may carry ``replace_labels``. Prepared
    batches are dicts of ``inputs``, ``noise``, ``timesteps``, ``labels``, ``dropped_labels`` and, where there are any,
    ``replace_labels``. A DiT's embedders are put in eval mode whenever it is called, as they would drop labels again,
    each by itself.

    Args:
        scheduler: a diffusers scheduler, for its noise and what the model predicts (noise, v or the sample).
        null_label: the label that says nothing; by default the last embedding of a ``UNet2DModel`` and
            ``num_embeds_ada_norm`` of a DiT.
        label_dropout: the probability of a label being replaced by it.
        reduction: over a sample's dimensions, ``mean`` or ``sum``.
        variational_bound: whether the variance is learned as well, which takes an output of twice the input's channels;
            by default where the output has them.
        antithetic: draw timesteps for half of a batch, and take T - 1 - t for the other half.
        guidance: scale of classifier-free guidance in the Fisher losses, s of e_u + s (e_c - e_u); None: no guidance.
        scaling_factor: of latents.
        replace_label: what a forgotten label shall be replaced by, where a method replaces; a batch's
            ``replace_labels`` go before it.
        seed: of the task's generator.
    """

    kind = "class-conditional diffusion"
    _EXPECTED = "(inputs, labels) or a dict with labels and"
    _NO_REPLACEMENT = "a forget batch has no replacement: give the task a replace_label or the batch replace_labels"

    def __init__(
        self,
        scheduler: Any,
        *,
        null_label: int | None = None,
        label_dropout: float = 0.1,
        reduction: str = "mean",
        variational_bound: bool | None = None,
        antithetic: bool = False,
        guidance: float | None = None,
        scaling_factor: float = 1.0,
        replace_label: int | None = None,
        seed: int = 0,
    ):
        super().__init__(
            scheduler,
            reduction=reduction,
            antithetic=antithetic,
            guidance=guidance,
            scaling_factor=scaling_factor,
            variational=variational_bound,
            seed=seed,
        )
        check_share("label_dropout", label_dropout)
        for name, label in (("null_label", null_label), ("replace_label", replace_label)):
            if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label < 0):
                raise InputError(f"{name}: expected an integer from 0, got {label!r}")
        self.null_label, self.label_dropout, self.replace_label = null_label, float(label_dropout), replace_label
        # Of the model, since begin():
        self._null = null_label
        self._embeddings: int | None = None  # labels that it knows, with the null label
        self._embedders: list[nn.Module] = []

    @property
    def _needs_null(self) -> bool:
        return self.label_dropout > 0 or self.guidance is not None

    # --- Raw batches ----------------------------------------------------------------------------------------

    def labels(self, batch: Any) -> Tensor:
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if _is_pair(batch) else None
        if not isinstance(labels, Tensor):
            self._samples(batch)  # says what a batch is
            raise InputError("a batch has no labels: add a tensor of class indices under 'labels'")
        return labels

    def _find_samples(self, batch: Any, prefix: str) -> Samples | None:
        if not prefix and _is_pair(batch):
            return Samples("inputs", batch[0])
        return super()._find_samples(batch, prefix)

    def _begin(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        kind = type(unwrapped(model)).__name__
        if config.get("cross_attention_dim") is not None:
            raise InputError(f"the model, a {kind}, is told prompts and not labels: use TextConditionalDiffusion")
        self._embedders = list(label_embedders(model))
        self._null, self._embeddings = self.null_label, None
        if (classes := config.get("num_embeds_ada_norm")) is not None:  # a DiT: the null label comes after the classes
            self._embeddings = min((e.embedding_table.num_embeddings for e in self._embedders), default=classes + 1)
            self._null = classes if self._null is None else self._null
        elif config:
            self._embeddings = config.get("num_class_embeds")
            if self._embeddings is None:
                raise InputError(
                    f"the model, a {kind}, is not class-conditional: train one with num_class_embeds, its number of "
                    "classes and one more for the null label"
                )
            if self._null is None and self._needs_null:  # else it may have none
                self._null = self._embeddings - 1
        if self._needs_null:
            self._check_null()
        if self.replace_label is not None and self._embeddings is not None and self.replace_label >= self._embeddings:
            raise InputError(
                f"replace_label {self.replace_label} is outside the model's {self._embeddings} label embeddings"
            )

    def _check_null(self) -> None:
        if self._null is None:
            raise InputError("label_dropout and guidance need a null label: give one, or set label_dropout=0")
        if self._embeddings is not None and (self._null >= self._embeddings or self._embeddings < 2):
            raise InputError(
                f"the null label is {self._null} and the model has {self._embeddings} label embeddings: it was trained "
                "without one; set label_dropout=0 and guidance=None"
            )

    def check(self, batch: Any) -> None:
        samples, labels = self._samples(batch), self.labels(batch)
        self._check_samples(samples)
        self._check_labels("labels", labels, samples.values.shape[0])
        if (replace := _replace_labels(batch)) is not None:
            self._check_labels("replace_labels", replace, samples.values.shape[0], null=True)

    def _check_labels(self, name: str, labels: Tensor, count: int, null: bool = False) -> None:
        """``null``: whether the null label may be among them."""
        if not are_indices(labels):
            raise InputError(
                f"{name}: expected integers of shape [N], got {labels.dtype} of shape {list(labels.shape)}"
            )
        if labels.shape[0] != count:
            raise InputError(f"a batch has {count} inputs and {labels.shape[0]} {name}: they must match")
        # Only on the CPU, where a loader leaves them: looking at labels on a device would wait for it.
        if self._embeddings is None or labels.device.type != "cpu":
            return
        known = self._embeddings
        if not null and self._null is not None:
            known -= self._null == known - 1
            if bool((labels == self._null).any()):
                raise InputError(
                    f"label {self._null} is the null label of the model's {self._embeddings} label embeddings: check "
                    "the labels, or set label_dropout=0 and guidance=None for a model without a null label"
                )
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < known:
                raise InputError(
                    f"label {label} is outside the model's {known} classes (0 to {known - 1}): check the labels or the "
                    "model"
                )

    def _has_replacement(self, batch: Any) -> bool:
        return self.replace_label is not None or _replace_labels(batch) is not None

    # --- Prepared batches -----------------------------------------------------------------------------------

    def prepare(self, batch: Any, device: torch.device) -> dict[str, Tensor]:
        self.check(batch)
        labels = self.labels(batch).long().to(device, non_blocking=True)
        prepared = self._draw_noise(self._draw_inputs(self._samples(batch), device), device)
        prepared.update(labels=labels, dropped_labels=labels)
        if self.label_dropout > 0:
            dropped = self._draw_drops(labels.shape[0], self.label_dropout).to(device, non_blocking=True)
            prepared["dropped_labels"] = torch.where(dropped, self._known_null(), labels)
        replace = _replace_labels(batch)
        if replace is not None:
            prepared["replace_labels"] = replace.long().to(device, non_blocking=True)
        elif self.replace_label is not None:
            prepared["replace_labels"] = torch.full_like(labels, self.replace_label)
        return prepared

    def _known_null(self) -> int:
        if self._null is None:
            raise InputError("the null label is not known yet: call begin(model, batch) first, or give null_label")
        return self._null

    # --- Losses ---------------------------------------------------------------------------------------------

    def _conditions(self, batch: Mapping[str, Tensor], which: str) -> Tensor:
        if which == "null":
            return torch.full_like(batch["labels"], self._known_null())
        return batch[{"dropped": "dropped_labels", "full": "labels", "replace": "replace_labels"}[which]]

    def _call(self, model: Any, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Any:
        # They stay in eval mode: gradient checkpointing calls them again in the backward pass.
        for embedder in label_embedders(model) if isinstance(model, nn.Module) else self._embedders:
            embedder.training = False
        return model(noisy, timesteps, class_labels=condition)


def label_embedders(model: nn.Module) -> Iterator[nn.Module]:
    """diffusers' LabelEmbedding, one in every block of a DiT, which drops labels in train mode."""
    return (module for module in model.modules() if hasattr(module, "token_drop"))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


def _replace_labels(batch: Any) -> Tensor | None:
    return batch.get("replace_labels") if isinstance(batch, Mapping) else None
