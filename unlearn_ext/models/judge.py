"""An external classifier's word on generated pictures, from a transformers image-classification folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.labels import fold
from ..errors import InputError, first_line
from ..utils.files import user_path
from ..utils.pixels import to_bytes
from .adapters import check_adapter_files
from .reading import check_loaded, check_sizes, read_config
from .variants import TRANSFORMERS, find_weights, note_pickles

__all__ = ["JUDGED_AT_ONCE", "Judge"]

JUDGED_AT_ONCE = 32


class Judge:
    """Probabilities over the classifier's own classes, so that a picture may be taken for something else altogether.

    Args:
        folder: what ``save_pretrained`` of a transformers image-classification model and of its image processor wrote.
        names: the generator's classes, index -> label text. The classifier's classes are matched to them by their
            text; without texts on either side, by index, if there are as many.
        shape: [C, H, W] of the generator's pictures; one is tried.

    Raises:
        InputError: the folder is no such model, classes cannot be matched, or a picture cannot be judged.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[int, str],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = user_path(folder)
        self._open_model(folder, AutoModelForImageClassification)
        try:
            self.processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, use_fast=False, trust_remote_code=False
            )
        except Exception as error:
            # Where the file is missing, transformers' own words are of its hub.
            why = f": {first_line(error)}" if (folder / "preprocessor_config.json").is_file() else ""
            raise InputError(
                f"--classifier: {folder} says nothing of how pictures are prepared (preprocessor_config.json){why}"
            ) from None
        self.model.to(device).eval()
        self.columns = dict(zip(names, _match(names, self.model.config), strict=True))
        try:
            finite = bool(
                self.probabilities(torch.zeros(1, *shape, dtype=torch.float32, device="cpu")).isfinite().all()
            )
        except Exception as error:  # of the processor and of the network: their settings may not fit each other
            raise InputError(
                f"--classifier: {folder} cannot judge a picture of this model ({first_line(error)}): save it with the "
                "image processor that it was trained with"
            ) from None
        if not finite:
            raise InputError(f"--classifier: {folder} gives inf or NaN for a grey picture: its weights are damaged")

    def _open_model(self, folder: Path, kind: Any) -> None:
        try:
            weights = find_weights(folder, "classifier", TRANSFORMERS)
            self.note = note_pickles({"classifier": weights})
            check_adapter_files(folder)  # transformers would open what it names in place of this model
            check_sizes(folder / "config.json", read_config(folder / "config.json"))
            self.model, loaded = kind.from_pretrained(
                folder,
                variant=weights.variant,
                use_safetensors=weights.safetensors,
                weights_only=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise InputError(
                f"--classifier: {folder} is no transformers image-classification folder: {first_line(error)}"
            ) from None
        try:
            check_loaded(folder, "classifier", loaded)
        except InputError as error:
            raise InputError(f"--classifier: {error}") from None

    @torch.no_grad()
    def probabilities(self, pictures: Tensor, batch_size: int = JUDGED_AT_ONCE) -> Tensor:
        """[N, classes of the classifier]; ``columns`` says which of them is each of the generator's.

        Args:
            pictures: [N, C, H, W] in [-1, 1].
        """
        device, parts = next(self.model.parameters()).device, []
        channels = getattr(self.model.config, "num_channels", 3)
        for part in pictures.split(batch_size):
            pixels = to_bytes(part).cpu()
            if pixels.shape[1] != channels:
                pixels = pixels.expand(-1, 3, -1, -1) if channels == 3 else pixels.float().mean(1, True).byte()
            images = list(pixels.numpy())
            inputs = self.processor(images=images, return_tensors="pt", input_data_format="channels_first")
            logits = self.model(pixel_values=inputs["pixel_values"].to(device)).logits
            parts.append(logits.float().softmax(dim=1).cpu())
        return torch.cat(parts)


def _match(names: Mapping[int, str], config: Any) -> list[int]:
    """The classifier's class of each of the generator's."""
    known = {int(index): _plain(text) for index, text in config.id2label.items()}
    if all(known.get(index) == _plain(text) for index, text in names.items()):  # also where two classes share a text
        return [int(index) for index in names]
    theirs = {text: index for index, text in known.items()}
    texts = [_plain(text) for text in names.values()]
    twice = next((text for text in texts if text in theirs and (texts + list(known.values())).count(text) > 2), None)
    if twice is not None:
        raise InputError(f"--classifier: more than one class is called {twice!r}: give them different texts")
    if all(_plain(text) in theirs for text in names.values()):
        return [theirs[text] for text in texts]
    unnamed = all(_plain(text) == f"label_{index}" for index, text in config.id2label.items())
    numbered = all(str(text) == str(index) for index, text in names.items())
    if (unnamed or numbered) and config.num_labels == len(names) == max(names) + 1:
        return list(names)
    missing = next(text for text in names.values() if _plain(text) not in theirs)
    raise InputError(
        f"--classifier: none of its {config.num_labels} classes is called {missing!r} as the model's is: set id2label "
        "in its config.json"
    )


def _plain(text: str) -> str:
    return fold(str(text))
