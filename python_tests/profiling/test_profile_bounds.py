"""``unlearn-ext profile`` refuses sizes that cannot be meant before it takes memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from unlearn_ext.cli import main
from unlearn_ext.errors import InputError
from unlearn_ext.profiling import memory
from unlearn_ext.profiling.shapes import named

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "arguments, code",
    [
        (("--threads", str(2**63 - 1)), 2),
        (("--threads", "9" * 5000), 2),
        (("--weights", "1" + 62 * "0"), 2),
        (("--weights", "9" * 5000), 2),
        (("--shapes", "99999999999999x3"), 1),
        (("--shapes", "9" * 5000 + "x3"), 1),
        (("--shapes", "3x" + "9" * 5000), 1),
        (("--shapes", "100x1000000000000", "--weights", "1000000000000"), 1),
    ],
    ids=lambda value: " ".join(part[:16] for part in value) if isinstance(value, tuple) else None,
)
def test_numbers_that_cannot_be_meant(arguments: tuple[str, ...], code: int, capsys) -> None:
    assert main(["profile", *arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.strip()


def test_memory_that_is_not_there(monkeypatch) -> None:
    shapes = [(1000, 1000)]
    needed = sum(memory.predicted(shapes, "adam", torch.float32).values()) + 4_000_000
    monkeypatch.setattr(memory, "available", lambda device: needed)
    memory.check_room(shapes, "adam", torch.float32, CPU)
    monkeypatch.setattr(memory, "available", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"^1e\+06 weights need 0\.0241 GB .* measure fewer with --weights$"):
        memory.check_room(shapes, "adam", torch.float32, CPU)
    monkeypatch.setattr(memory, "available", lambda device: None)  # where the system does not say
    memory.check_room(shapes, "adam", torch.float32, CPU)


@pytest.mark.parametrize(
    "shape", ("[-1]", '["3"]', "[3.5]", "[true]", "3", "null", "[9223372036854775808]", "[" * 90_000)
)
def test_shapes_of_a_file_that_are_no_shapes(shape: str, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).replace("[1]", shape).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=r"w\.safetensors is no safetensors file"):
        named(str(tmp_path / "w.safetensors"))
