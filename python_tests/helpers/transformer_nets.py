"""Small classifiers of transformers, made from configurations, and the batches that their collators give."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

CLASSES = 3
_LONGEST = 9  # tokens of a text


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config).eval()


def vit(seed: int = 0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).eval()


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Samples of different lengths, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(3, _LONGEST + 1, (), generator=generator))
        ids = torch.randint(1, 30, (length,), generator=generator)
        found.append({"input_ids": ids, "token_type_ids": torch.arange(length) // 4 % 2, "label": i % CLASSES})
    return found


def images(count: int, seed: int) -> list[dict[str, Any]]:
    pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "label": i % CLASSES} for i, image in enumerate(pixels)]


def pad(samples: list[dict[str, Any]], length: int | None = None, left: bool = False) -> UserDict:
    """As DataCollatorWithPadding does: to the longest text of the batch, with its mask, in no dict of Python's own."""
    length = length or max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, Tensor] = {}
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        rows = [sample.get(name, torch.ones_like(sample["input_ids"])) for sample in samples]
        sides = [(length - len(row), 0) if left else (0, length - len(row)) for row in rows]
        batch[name] = torch.stack([nn.functional.pad(row, side) for row, side in zip(rows, sides, strict=True)])
    return UserDict(batch, labels=torch.tensor([sample["label"] for sample in samples]))


def stack(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As transformers' default collator does."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


NETS = {"bert": (bert, texts, pad), "vit": (vit, images, stack)}


def loader(name: str, count: int, seed: int, batch_size: int = 4, **arguments: Any) -> DataLoader:
    _, samples, collate = NETS[name]
    return DataLoader(samples(count, seed), batch_size=batch_size, collate_fn=collate, **arguments)
