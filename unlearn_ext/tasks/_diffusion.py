"""What the diffusion tasks share: images or latents, noise and timesteps drawn once, the denoising loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed.wrappers import unwrapped
from ..errors import InputError
from ..utils.arguments import check_finite, check_number, check_seed
from ._noise import NoiseSchedule
from ._variational import variational_bound
from .base import Task

__all__ = ["Diffusion", "check_share", "configuration", "dtype_of"]

# Beyond it, pixel values are no images in [-1, 1], even standardised ones.
_FAR_OUTSIDE = 8.0


@dataclass
class Samples:
    """The images or latents of a raw batch: ``values``, or a Gaussian of mean ``values`` and deviation ``std``."""

    kind: str  # "inputs" as given, "pixel_values", "latents" or "latent_mean"
    values: Tensor
    std: Tensor | None = None


class Diffusion(Task):
    """A denoiser's loss. Subclasses say what conditions it.

    Everything random is drawn by :meth:`prepare`, once for each sample, in float32 on the CPU from the task's own
    generator, whatever the device and precision: the same seed gives the same batches everywhere. The order is: latent
    samples, timesteps, noise, dropped conditions; what a batch does not need is not drawn.
    """

    _EXPECTED: ClassVar[str]  # what a raw batch is, up to its samples
    _NO_REPLACEMENT: ClassVar[str]  # what is missing, and what to do

    def __init__(
        self,
        scheduler: Any,
        *,
        reduction: str,
        antithetic: bool,
        guidance: float | None,
        scaling_factor: float,
        variational: bool | None,
        seed: int,
    ):
        self.schedule = NoiseSchedule(scheduler)
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction: expected mean or sum, got {reduction!r}")
        if guidance is not None:
            check_finite("guidance", guidance)
        check_number("scaling_factor", scaling_factor, "a finite number above 0", lambda x: 0.0 < x < math.inf)
        if variational is not False and not self.schedule.learned_range:
            raise InputError(
                "scheduler: variance_type 'learned' has no variational term here, only 'learned_range': set "
                "variational_bound=False"
            )
        self.reduction, self.antithetic, self.guidance = reduction, antithetic, guidance
        self.scaling_factor, self.variational_bound = float(scaling_factor), variational
        self.seed = check_seed("seed", seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        # Of the model, since begin():
        self._dtype: torch.dtype | None = None
        self._channels: int | None = None
        self._size: tuple[int, int] | None = None

    def generators(self) -> list[torch.Generator]:
        return [self.generator]

    # --- Raw batches ----------------------------------------------------------------------------------------

    def inputs(self, batch: Any) -> Tensor:
        """The samples of a raw batch, and of a prepared one."""
        if isinstance(batch, Mapping) and "noise" in batch:
            return batch["inputs"]
        return self._samples(batch).values

    def begin(self, model: nn.Module, batch: Any) -> None:
        """Learns from the model's configuration what batches must fit, and checks this one. Draws nothing."""
        self._dtype = dtype_of(model)
        config = configuration(model)
        self._channels = config.get("in_channels")
        size = config.get("sample_size")
        self._size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
        self._begin(model, config)
        self.check(batch)

    def _begin(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        """What more is to be learned from the model."""

    def _samples(self, batch: Any, prefix: str = "") -> Samples:
        """The samples of a raw batch; ``prefix`` finds those that stand in their place."""
        found = self._find_samples(batch, prefix)
        if found is None:
            names = ", ".join(prefix + name for name in ("pixel_values", "latents", "latent_mean and latent_std"))
            got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(f"a batch is {self._EXPECTED} with one of {names}, all tensors; got {got}")
        return found

    def _find_samples(self, batch: Any, prefix: str) -> Samples | None:
        if not isinstance(batch, Mapping):
            return None
        found: list[Samples] = []
        for kind in ("pixel_values", "latents", "latent_mean"):
            values = batch.get(prefix + kind)
            std = batch.get(prefix + "latent_std") if kind == "latent_mean" else None
            if isinstance(values, Tensor) and (kind != "latent_mean" or isinstance(std, Tensor)):
                found.append(Samples(kind, values, std))
        if len(found) > 1:
            kinds = " and ".join(prefix + samples.kind for samples in found)
            raise InputError(f"a batch has {kinds}: give one of them")
        return found[0] if found else None

    def _check_samples(self, samples: Samples) -> None:
        values = samples.values
        what = "latents" if samples.kind.startswith("latent") else "images"
        if values.dim() != 4:
            raise InputError(f"{what}: expected shape [N, channels, height, width], got {list(values.shape)}")
        if values.shape[0] == 0:
            raise InputError("a batch is empty: drop it, or set drop_last=True on its loader")
        if not values.is_floating_point():
            scale = " and scale them to [-1, 1]" if what == "images" else ""
            raise InputError(f"{what} are {values.dtype}: convert them to floating-point numbers{scale}")
        if samples.std is not None and samples.std.shape != values.shape:
            raise InputError(
                f"latent_std has shape {list(samples.std.shape)} and latent_mean {list(values.shape)}: they must match"
            )
        if self._channels is not None and values.shape[1] != self._channels:
            raise InputError(
                f"{what} have {values.shape[1]} channels and the model takes {self._channels}: convert them"
                + (", or encode them through its VAE" if what == "images" else "")
            )
        if self._size is not None and tuple(values.shape[2:]) != self._size:
            own, expected = ("×".join(map(str, size)) for size in (values.shape[2:], self._size))
            raise InputError(f"{what} are {own} and the model takes {expected}: resize them")
        # Only on the CPU, where a loader leaves them: looking at values on a device would wait for it.
        pixels = samples.kind == "pixel_values" or (samples.kind == "inputs" and self._channels in (1, 3))
        if pixels and values.device.type == "cpu":
            low, high = (float(x) for x in torch.aminmax(values.detach()))
            if max(-low, high) > _FAR_OUTSIDE:
                raise InputError(f"image values go from {low:g} to {high:g}: scale images to [-1, 1]")

    def check_replacement(self, batch: Any) -> None:
        if not self._has_replacement(batch):
            raise InputError(self._NO_REPLACEMENT)

    @abstractmethod
    def _has_replacement(self, batch: Any) -> bool:
        """Whether a batch, raw or prepared, can be asked for replacement losses."""

    # --- Prepared batches -----------------------------------------------------------------------------------

    def _draw_inputs(self, samples: Samples, device: torch.device) -> Tensor:
        values = self._move(samples.values, device)
        if samples.std is not None:
            values = values + self._move(samples.std, device) * self._normal(values, device)
        return values * self.scaling_factor if samples.kind.startswith("latent") else values

    def _draw_noise(self, inputs: Tensor, device: torch.device) -> dict[str, Tensor]:
        timesteps = self.schedule.draw(inputs.shape[0], self.generator, self.antithetic)
        return {
            "inputs": inputs,
            "noise": self._normal(inputs, device),
            "timesteps": timesteps.to(device, non_blocking=True),
        }

    def _draw_drops(self, count: int, probability: float) -> Tensor:
        if probability == 0:
            return torch.zeros(count, dtype=torch.bool, device="cpu")
        return torch.rand(count, generator=self.generator, dtype=torch.float32, device="cpu") < probability

    def _normal(self, like: Tensor, device: torch.device) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return self._move(drawn, device)

    def _move(self, values: Tensor, device: torch.device) -> Tensor:
        """To the device, in float32 or what the model has beyond it."""
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        return values.detach().to(device, wide, non_blocking=True)

    # --- Losses ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _conditions(self, batch: Mapping[str, Tensor], which: str) -> Tensor:
        """What the model is told: ``dropped`` (some of it), ``full``, ``null`` or ``replace``."""

    @abstractmethod
    def _call(self, model: Any, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Any:
        """The model's output."""

    def losses(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        noisy = self.schedule.add(batch["inputs"], batch["noise"], batch["timesteps"])
        output = self._predict(model, noisy, batch["timesteps"], self._conditions(batch, "dropped"))
        return self._denoising(batch, noisy, *output)

    def fisher_losses(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        r"""No condition is dropped; with guidance s, of the prediction :math:`e_u + s (e_c - e_u)`."""
        timesteps = batch["timesteps"]
        noisy = self.schedule.add(batch["inputs"], batch["noise"], timesteps)
        if self.guidance is None:
            output = self._predict(model, noisy, timesteps, self._conditions(batch, "full"))
            return self._denoising(batch, noisy, *output)
        conditions = torch.cat([self._conditions(batch, "full"), self._conditions(batch, "null")])
        prediction, values = self._predict(
            model, torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), conditions
        )
        with_it, without = prediction.chunk(2)
        guided = without + self.guidance * (with_it - without)
        return self._denoising(batch, noisy, guided, None if values is None else values.chunk(2)[0])

    def replacement_losses(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The distance to what the model itself, held fixed, predicts for the replacement at the same t and noise."""
        self.check_replacement(batch)
        timesteps, noise = batch["timesteps"], batch["noise"]
        noisy = self.schedule.add(batch["inputs"], noise, timesteps)
        # Before the target: autocast may keep weights that it has rounded, and must have their gradients.
        prediction, _ = self._predict(model, noisy, timesteps, self._conditions(batch, "full"))
        replacement = self.schedule.add(batch.get("replace_inputs", batch["inputs"]), noise, timesteps)
        with torch.no_grad():
            target, _ = self._predict(model, replacement, timesteps, self._conditions(batch, "replace"))
        return self._reduce((prediction - target) ** 2)

    def losses_and_distances(
        self,
        model: Any,
        teacher: nn.Module,
        batch: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,
        negative_guidance: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Distances are squared errors, reduced as losses are, of the model's prediction to the teacher's at the same
        noisy sample and condition; with ``negative_guidance`` η to
        :math:`\epsilon_0(c') - \eta (\epsilon_0(c) - \epsilon_0(\varnothing))`, no condition being dropped and c' being
        the batch's replacement, or c where it has none. Noise predictions have no temperature.
        """
        timesteps = batch["timesteps"]
        noisy = self.schedule.add(batch["inputs"], batch["noise"], timesteps)
        condition = self._conditions(batch, "dropped" if negative_guidance is None else "full")
        prediction, values = self._predict(model, noisy, timesteps, condition)
        with torch.no_grad():
            if negative_guidance is None:
                target, _ = self._predict(teacher, noisy, timesteps, condition)
            else:
                target = self._turned_away(teacher, batch, noisy, negative_guidance)
        distances = self._reduce((prediction - target) ** 2)
        return self._denoising(batch, noisy, prediction, values), distances

    def _turned_away(self, teacher: nn.Module, batch: Mapping[str, Tensor], noisy: Tensor, scale: float) -> Tensor:
        which = ["full", "null"] + ["replace"] * self._has_replacement(batch)
        conditions = torch.cat([self._conditions(batch, name) for name in which])
        predictions, _ = self._predict(
            teacher, torch.cat([noisy] * len(which)), torch.cat([batch["timesteps"]] * len(which)), conditions
        )
        told, untold, *others = predictions.chunk(len(which))
        return (others[0] if others else told) - scale * (told - untold)

    def _predict(self, model: Any, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and what tells the variance where the output has it; in float32 or wider."""
        dtype = dtype_of(model) or self._dtype or noisy.dtype
        output = self._call(model, noisy.to(dtype), timesteps, condition)
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple) else output
        output = output if output.dtype == torch.float64 else output.float()
        channels = noisy.shape[1]
        if output.shape[1] == channels and self.variational_bound is not True:
            return output, None
        if output.shape[1] != 2 * channels or output.shape[2:] != noisy.shape[2:]:
            expected = f"{2 * channels}" if self.variational_bound else f"{channels} or {2 * channels}"
            raise InputError(
                f"the model's output: expected {expected} channels for {channels} of the input, got shape "
                f"{list(output.shape)}"
            )
        prediction, values = output.chunk(2, dim=1)
        return prediction, None if self.variational_bound is False else values

    def _denoising(
        self, batch: Mapping[str, Tensor], noisy: Tensor, prediction: Tensor, values: Tensor | None
    ) -> Tensor:
        inputs, timesteps = batch["inputs"], batch["timesteps"]
        losses = self._reduce((prediction - self.schedule.target(inputs, batch["noise"], timesteps)) ** 2)
        if values is not None:
            bound = variational_bound(self.schedule, prediction, values, inputs, noisy, timesteps)
            losses = losses + self._reduce(bound)
        return losses

    def _reduce(self, elements: Tensor) -> Tensor:
        flat = elements.flatten(1)
        return flat.sum(1) if self.reduction == "sum" else flat.mean(1)


def dtype_of(model: Any) -> torch.dtype | None:
    """Of a module's weights; None for a function."""
    if not isinstance(model, nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def configuration(model: nn.Module) -> Mapping[str, Any]:
    """diffusers' configuration of a model, empty for any other."""
    model = unwrapped(model)
    config = getattr(model, "config", None) if hasattr(model, "register_to_config") else None
    return config if isinstance(config, Mapping) else {}


def check_share(name: str, value: Any) -> None:
    check_number(name, value, "a probability in [0, 1]", lambda x: 0.0 <= x <= 1.0)
