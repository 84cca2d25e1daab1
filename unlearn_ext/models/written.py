"""Writes a folder like the one that was opened, in which the denoiser's weights are the only file that differs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor, nn

from ..distributed.wrappers import own_names, unwrapped
from ..errors import InputError
from ..utils.files import atomic_directory, follow_umask, user_path
from ..utils.leftovers import is_leftover
from .layout import COMPONENTS, INDEX, is_weights, part_names
from .links import leaves
from .pretrained import Pretrained
from .reading import read_config

__all__ = ["OWN_FOLDER", "Plan", "foreign_entries", "plan_result", "write_result"]

OWN_FOLDER = "unlearning"  # in a result: result.json, pictures, mask, history
_OF_DOWNLOADS = (".git", ".cache", "__pycache__")


@dataclass(frozen=True)
class Plan:
    """What a result folder will hold.

    Attributes:
        copied: files of the source, byte for byte, relative to it.
        left_out: others, and folders whose whole content is left out, and why: mostly that they may hold the weights as
            they were before.
        copied_bytes, denoiser_bytes: their sizes.
    """

    copied: tuple[str, ...]
    left_out: dict[str, str]
    copied_bytes: int
    denoiser_bytes: int

    @property
    def bytes(self) -> int:
        return self.copied_bytes + self.denoiser_bytes


def plan_result(source_folder: str | Path, pretrained: Pretrained) -> Plan:
    """What :func:`write_result` copies from the source, and what it leaves out."""
    source, place = user_path(source_folder), pretrained.denoiser_folder
    components = _components(source, pretrained)
    copied: list[str] = []
    left_out: dict[str, str] = {}
    old: set[tuple[int, int]] = set()  # files that hold weights of the denoiser, under whatever name
    for name, why in _files(source, source):
        path = PurePosixPath(name)
        top = path.parts[0] if len(path.parts) > 1 else ""
        if why is not None:
            left_out[name] = why
        elif is_weights(path) and top not in components:
            if top == place:
                left_out[name] = "the denoiser's weights as they were"
            else:
                left_out[name] = "weights outside the pipeline's parts, which may hold what was forgotten"
            old.add(_identity(source / name))
        else:
            copied.append(name)
    for name in [name for name in copied if _identity(source / name) in old]:
        copied.remove(name)
        left_out[name] = "the denoiser's weights as they were, by another name"
    size = sum((source / name).stat().st_size for name in copied)
    denoiser = sum(t.numel() * t.element_size() for t in unwrapped(pretrained.denoiser).state_dict().values())
    return Plan(tuple(copied), left_out, size, denoiser)


def _identity(path: Path) -> tuple[int, int]:
    """The same for a file, its links and its hard links."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _files(source: Path, folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, str | None]]:
    """What is in a folder of the source: names relative to ``source``, and why each is left out, if it is.

    Links within the source are followed: a hub cache is made of them.

    Args:
        above: real paths of the folders that it is in.
    """
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): it is to be copied into the result") from None
    for path in entries:
        name = path.relative_to(source).as_posix()
        if leaves(path, source):
            yield name, "a link that leaves the model's folder"
        elif path.is_dir():
            if name == OWN_FOLDER:
                yield name, "the record of the run that wrote the source"
            elif path.name in _OF_DOWNLOADS:
                yield name, "what a clone or a download leaves"
            elif os.path.realpath(path) in above:
                yield name, "a link to a folder that it is in"
            else:
                yield from _files(source, path, above)
        elif not path.is_file():
            raise InputError(f"{path} is a link to nothing, or no file: download the model anew")
        elif not os.access(path, os.R_OK):
            raise InputError(f"{path} cannot be read, and is to be copied into the result: make it readable")
        else:
            yield name, None


def foreign_entries(output: Path, source: Path) -> list[str]:
    """Names of what is in the folder for a result, but for what killed runs were writing; nothing is written.

    Args:
        source: the folder of the model that is read.

    Raises:
        InputError: no result can be written there: it lies in the source, is a file, or is closed to this user.
    """
    another = "choose another output folder"
    try:
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
            raise InputError(f"{output} lies in the model's own folder: {another}")
        if os.path.lexists(output) and not output.is_dir():
            raise InputError(f"{output} is a {'link to nothing' if output.is_symlink() else 'file'}: {another}")
        there = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"cannot write to {there}: {another}")
        return sorted(path.name for path in output.iterdir() if not is_leftover(path)) if output.exists() else []
    except OSError as error:
        raise InputError(f"{output} cannot be read ({error.strerror}): {another}") from None


def write_result(
    source_folder: str | Path,
    pretrained: Pretrained,
    output_folder: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Writes a folder like the source, in which the denoiser's weights are those of ``pretrained.denoiser``.

    It opens as the source does. All other files are the source's, byte for byte, the denoiser's ``config.json`` too;
    weights of other formats, variants or checkpoints that lie beside the pipeline's parts are left out, for they hold
    the model as it was. The folder is whole or not there.

    Args:
        weights: by parameter name: saved in place of the denoiser's own, such as a moving average.

    Returns:
        What was copied and what was left out.

    Raises:
        InputError: the output is not empty, the denoiser's tensors are not those that were opened, the disk is full.
    """
    source, model = user_path(source_folder), unwrapped(pretrained.denoiser)
    output = user_path(output_folder)
    if there := foreign_entries(output, source):
        raise InputError(f"{output} holds {there[0]} already: choose an empty output folder, nothing is overwritten")
    plan = plan_result(source, pretrained)
    state = _state(pretrained, weights)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(output) as partial:
            with _state_dict_of(model, state):
                model.save_pretrained(
                    partial / pretrained.denoiser_folder,
                    safe_serialization=True,
                    variant=pretrained.variant,
                )
            follow_umask(partial)
            for name in plan.copied:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(source / name, partial / name)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}): {plan.bytes:,} bytes are needed; nothing was left"
        ) from None
    return plan


def _copy(source: Path, target: Path) -> None:
    """With its mode, but for what lets a program run as somebody else."""
    shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o777)


def _components(source: Path, pretrained: Pretrained) -> set[str]:
    """Folders of a pipeline's other parts."""
    index = read_config(source / INDEX) if (source / INDEX).is_file() else None
    names = COMPONENTS if index is None else part_names(index)
    return {name for name in names if name != pretrained.denoiser_folder}


def _state(pretrained: Pretrained, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Every tensor in memory of its own: safetensors refuse those that share it, as tied embedders do."""
    model = unwrapped(pretrained.denoiser)
    named = own_names(model.state_dict(keep_vars=True).items())
    if pretrained.names and named.keys() != pretrained.names:
        name = min(named.keys() ^ pretrained.names)
        raise InputError(
            f"the denoiser has other tensors than the model that was opened ({name}): remove adapters or "
            "parametrizations, or merge them"
        )
    replaced = {}
    for name, value in own_names((weights or {}).items()).items():
        if name not in named or named[name].shape != value.shape:
            raise InputError(f"weights: the denoiser has no {name} of shape {list(value.shape)}")
        replaced[id(named[name])] = value  # a tied one goes by the first of its names
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        value = replaced.get(id(tensor), tensor).detach().to(tensor.dtype).contiguous()
        state[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return state


@contextlib.contextmanager
def _state_dict_of(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """What ``save_pretrained`` is to take for the model's state."""
    model.state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del model.state_dict
