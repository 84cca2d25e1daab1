"""Reads mutated files with one parser after the other, under a limit of memory; a line of JSON for each.

Arguments: a folder, how many inputs for each parser, and the parsers' names (none: all).
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.certifying import MODEL
from helpers.models import batches, make
from helpers.mutations import mutated_bytes, mutated_json, mutated_png, mutated_safetensors, mutated_text, mutated_zip
from helpers.runs import identical, loaders, run, weights
from PIL import Image

from unlearn_ext.certified import DescentToDelete, Publication
from unlearn_ext.data import open_data, read_class_map
from unlearn_ext.errors import DamagedError, UnlearnError
from unlearn_ext.jobs.prompts import read_prompts
from unlearn_ext.methods import parse
from unlearn_ext.profiling.shapes import cut, named
from unlearn_ext.saliency import SaliencyMask
from unlearn_ext.utils.seal import label_of, seal

ROOM = 1 << 30  # bytes of address space beyond what the process has when it starts to read
SECONDS = 20  # for one input
SHOWN = 5  # failures of a parser


@dataclass
class Parser:
    """A file in a folder of its own, how it is changed, and how it is read."""

    file: str
    mutate: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], Any]
    make: Callable[[Path], None]  # writes the folder that is valid


# --- Valid files ----------------------------------------------------------------------------------------------


def masks() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=rng) < 0.5 for name, shape in {"a": (3, 5), "b": (70,)}.items()}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    return {"images": images, "labels": np.array([0, 1, 2, 0, 1, 2])}


def pictures(folder: Path, suffix: str = "png") -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
            picture.save(folder / "data" / name / f"{i}.{suffix}")


def saved_run(folder: Path, data: dict[str, Any] | None = None) -> None:
    run(make(), data, {"iterations": 4}, output_dir=folder / "run", checkpointing_steps=2)


def certify() -> DescentToDelete:
    features = torch.nn.functional.normalize(torch.rand(400, 65, generator=torch.Generator().manual_seed(0)), dim=1)
    return DescentToDelete(MODEL, features.double() * 0.99, torch.arange(400) % 10, epsilon=5.0, delta=1e-3)


# --- Readers --------------------------------------------------------------------------------------------------


def read_array(path: Path) -> None:
    data = open_data(path, size=4, channels=3, classes=3)
    data[0], data[len(data) - 1]


def read_pictures(path: Path) -> None:
    data = open_data(path.parents[1], size=4, channels=3)
    data.verify(range(len(data)))
    for i in range(len(data)):
        if i not in data.unreadable:
            data[i]


def read_prompt_file(path: Path) -> None:
    data = open_data(path.parent / "data", size=4, channels=3)
    read_prompts(data, path, ["a cat"], "a dog")


def resume(path: Path) -> None:
    root = path if path.name == "run" else next(p for p in path.parents if p.name == "run")
    run(make(seed=1), changes={"iterations": 4}, output_dir=root, resume_from_checkpoint="latest")


def resume_sealed(path: Path) -> None:
    """With hashes that fit, as in a checkpoint from elsewhere. Where it is damaged the model stays as it is."""
    seal(path.parent, label_of(path.parent))
    model = make(seed=1)
    before = weights(model)
    try:
        run(
            model,
            loaders(),
            {"iterations": 4},
            output_dir=path.parents[2] / "again",
            resume_from_checkpoint=path.parent,
        )
    except DamagedError:
        assert identical(before, weights(model)), "a refused checkpoint has changed the model"
        raise


def read_secret(path: Path) -> None:
    features = torch.nn.functional.normalize(torch.rand(400, 65, generator=torch.Generator().manual_seed(0)), dim=1)
    DescentToDelete.load_secret(path, features.double() * 0.99, torch.arange(400) % 10)


TEXTS = ("sfron:forget_alpha=50,gamma=none", "sfron@cifar10-resnet18:iterations=300,lr=0.1", "salun:mask_fraction=0.5")
TEXTS += ("finetune:epochs=2.5,betas=(0.9,0.99),rule=adamw", "sfron:param_groups={'conv*':{'lr':0.5}},max_norm=1")


def text_file(text: str | bytes, name: str) -> Callable[[Path], None]:
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(content)


def as_bytes(rng: random.Random, data: bytes) -> bytes:
    return mutated_text(rng, data.decode()).encode("utf-8", "surrogatepass")


def method_text(path: Path) -> None:
    parse(path.read_bytes().decode("utf-8", "replace"))


def torch_file(value: Any, **options: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / "mask.pt", **options)


def npz(save: Callable[..., None]) -> Callable[[Path], None]:
    return lambda folder: save(folder / "data.npz", **arrays())


def array_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(arrays(), folder / "data.safetensors")


def network_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: mask.float() for name, mask in masks().items()}, folder / "net.safetensors")


def with_prompts(folder: Path) -> None:
    pictures(folder)
    (folder / "prompts.json").write_text(json.dumps({"cat": "a cat", "dog": "a dog"}))


def mutated_npy(rng: random.Random, data: bytes) -> bytes:
    """Its header, which is Python's text of a dict, or any bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    length = int.from_bytes(data[8:10], "little")
    header = as_bytes(rng, data[10 : 10 + length])[:65535]
    return data[:8] + len(header).to_bytes(2, "little") + header + data[10 + length :]


def mutated_entry(rng: random.Random, data: bytes) -> bytes:
    """One entry of a document is changed, each as often as the longest."""
    document = json.loads(data)
    key = rng.choice(sorted(document))
    changed = mutated_json(rng, json.dumps(document[key]).encode())
    marker = "\x01entry\x01"
    return json.dumps({**document, key: marker}).encode().replace(json.dumps(marker).encode(), changed)


INT_MAP, TEXT_MAP = '{"cat": 0, "dog": 1}', "cat 0\ndog 1\n"
PICTURE = "data/cat/0"
CHECKPOINT = "run/checkpoint-4"
PARSERS: dict[str, Parser] = {
    **{
        f"method text {i}": Parser("text", as_bytes, method_text, text_file(text, "text"))
        for i, text in enumerate(TEXTS)
    },
    "mask": Parser(
        "mask.safetensors",
        mutated_safetensors,
        SaliencyMask.load,
        lambda folder: SaliencyMask.from_dict(masks()).save(folder / "mask.safetensors"),
    ),
    "mask of torch.save": Parser("mask.pt", mutated_zip(mutated_bytes), SaliencyMask.from_pt, torch_file(masks())),
    "mask of old torch.save": Parser(
        "mask.pt", mutated_bytes, SaliencyMask.from_pt, torch_file(masks(), _use_new_zipfile_serialization=False)
    ),
    "Fisher of torch.save": Parser(
        "mask.pt",
        mutated_zip(mutated_bytes),
        lambda path: SaliencyMask.from_fisher_pt(path, path),
        torch_file({"a": torch.ones(3, 5), "b": torch.zeros(70)}),
    ),
    "class map of JSON": Parser("map.json", mutated_json, read_class_map, text_file(INT_MAP, "map.json")),
    "class map of a list": Parser("map.json", mutated_json, read_class_map, text_file('["cat", "dog"]', "map.json")),
    "class map of lines": Parser("map.txt", as_bytes, read_class_map, text_file(TEXT_MAP, "map.txt")),
    "prompts": Parser("prompts.json", mutated_json, read_prompt_file, with_prompts),
    "npz": Parser("data.npz", mutated_zip(mutated_npy), read_array, npz(np.savez)),
    "compressed npz": Parser("data.npz", mutated_zip(mutated_npy), read_array, npz(np.savez_compressed)),
    "array safetensors": Parser("data.safetensors", mutated_safetensors, read_array, array_safetensors),
    **{
        kind: Parser(f"{PICTURE}.{kind}", change, read_pictures, lambda folder, kind=kind: pictures(folder, kind))
        for kind, change in {"png": mutated_png, **dict.fromkeys(("jpg", "webp", "bmp"), mutated_bytes)}.items()
    },
    "shapes to profile": Parser(
        "net.safetensors", mutated_safetensors, lambda path: cut(named(str(path)), 100), network_safetensors
    ),
    "history": Parser("run/history.jsonl", mutated_json, resume, saved_run),
    "state of a checkpoint": Parser(f"{CHECKPOINT}/state.json", mutated_json, resume, saved_run),
    "sealed state of a checkpoint": Parser(
        "run/checkpoint-2/state.json", mutated_entry, resume_sealed, lambda folder: saved_run(folder, loaders())
    ),
    "secret": Parser(
        "secret.safetensors",
        mutated_safetensors,
        read_secret,
        lambda folder: certify().save_secret(folder / "secret.safetensors"),
    ),
    "certificate": Parser(
        "out/certificate.json", mutated_json, lambda path: Publication.load(path.parent),
        lambda folder: certify().publish().save(folder / "out"),
    ),
    "published weights": Parser(
        "out/weights.safetensors", mutated_safetensors, lambda path: Publication.load(path.parent),
        lambda folder: certify().publish().save(folder / "out"),
    ),
}  # fmt: skip


# --- One parser after the other -------------------------------------------------------------------------------


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def limit_memory() -> None:
    words = Path("/proc/self/statm").read_text().split()
    size = int(words[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, files: dict[Path, bytes]) -> None:
    """Readers may write: a run that resumes goes on."""
    for path in [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()]:
        if path.relative_to(folder) not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)


def fuzz(name: str, parser: Parser, folder: Path, count: int) -> dict[str, Any]:
    folder.mkdir(parents=True)
    parser.make(folder)
    files = snapshot(folder)
    valid = files[Path(parser.file)]
    parser.read(folder / parser.file)
    refused, failures, slowest, peak = 0, [], 0.0, memory()
    for seed in range(count):
        restore(folder, files)
        (folder / parser.file).write_bytes(parser.mutate(random.Random(f"{name} {seed}"), valid))
        started = time.perf_counter()
        try:
            with limited(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                parser.read(folder / parser.file)
        except UnlearnError as error:
            refused += 1
            if "\n" in str(error):
                failures.append(f"seed {seed}: {error!r} has several lines")
        except BaseException as error:
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
            failures.append(f"seed {seed}: {type(error).__name__}: {str(error)[:150]} at {' '.join(where)}")
        slowest = max(slowest, time.perf_counter() - started)
    grown = memory() - peak
    return {
        "inputs": count, "refused": refused, "failed": len(failures), "failures": failures[:SHOWN],
        "slowest": slowest, "grown": grown,
    }  # fmt: skip


def memory() -> int:
    """Bytes that the process has had resident at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(folder: str, count: str, *names: str) -> None:
    torch.set_num_threads(1)
    read_pictures_once(Path(folder))
    limit_memory()
    for name in names or PARSERS:
        print(json.dumps({"begins": name}), flush=True)
        result = fuzz(name, PARSERS[name], Path(folder, name.replace(" ", "-")), int(count))
        print(json.dumps({"ended": name, **result}), flush=True)


def read_pictures_once(folder: Path) -> None:
    """What is loaded on first use is no memory of the parser: the pictures' library, its threads, the kernels."""
    (folder / "first").mkdir(parents=True)
    pictures(folder / "first")
    read_pictures(folder / "first" / f"{PICTURE}.png")
    run(make(), {"forget": batches(1, 4, seed=0), "retain": batches(1, 4, seed=1)}, changes={"iterations": 1})


if __name__ == "__main__":
    main(*sys.argv[1:])
