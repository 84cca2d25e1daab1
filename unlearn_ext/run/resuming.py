"""Opens the checkpoint that a run goes on from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..errors import DamagedError, InputError
from ..utils.reading import explain_open_errors
from ..utils.seal import SEAL
from ..utils.warn import warn
from . import checkpoint as checkpoint_files
from .checkpoint_folder import candidates
from .context import RunContext

__all__ = ["open_checkpoint", "read_checkpoint"]


def open_checkpoint(context: RunContext, directory: Path | None, resume: str | Path) -> checkpoint_files.Checkpoint:
    """Reads the checkpoint that ``resume`` names, or the newest that is not damaged; nothing is changed.

    Raises:
        InputError: there is none, or it is of a run with other settings, weights or mask.
        DamagedError: it is damaged, or all of them are.
    """
    with context.ranks.together():
        paths = candidates(directory, resume)
    paths = context.ranks.from_first(paths)
    first: DamagedError | None = None
    for path in paths:
        try:
            checkpoint = read_checkpoint(context, path)
        except DamagedError as error:
            first = first or error
            continue
        if first is not None:
            what = str(first).partition("; resume")[0]
            warn(f"{what}; the run goes on from {path.name}")
        return checkpoint
    if len(paths) > 1:
        raise DamagedError(f"{str(first).partition('; resume')[0]}, and so are all others: start the run again")
    raise first


def read_checkpoint(context: RunContext, path: Path) -> checkpoint_files.Checkpoint:
    """Reads the whole of it; nothing is changed.

    Raises:
        InputError: it is damaged, or of a run with other settings, weights or mask.
    """
    with context.ranks.together(), explain_open_errors(path / SEAL):
        if context.ranks.first:
            checkpoint_files.verify(path)
    with context.ranks.together(), explain_open_errors(path / SEAL):
        checkpoint = checkpoint_files.read(path, context.ranks)
        names = [name for name, _ in context.named]
        defaults = context.method.defaults()
        settings = {**context.settings(), **_other_length(context, checkpoint)}
        checkpoint_files.check(checkpoint, context.model, names, settings, defaults, context.method.mask)
    return checkpoint


def _other_length(context: RunContext, checkpoint: checkpoint_files.Checkpoint) -> dict[str, Any]:
    """Settings that say how long the saved run was, where what it did so far does not hang on them: the run can be
    continued for more iterations or fewer."""
    method, document = copy.copy(context.method), checkpoint.document  # a resume that is refused leaves no trace
    saved = {name: document["settings"].get(name) for name in ("iterations", "epochs")}
    now, done = method.iterations, document["iteration"]
    same = document["settings"].get("method") == type(method).__name__
    if saved["iterations"] in (None, now) or not same:
        return {}
    if now < done:
        raise InputError(f"{checkpoint.path} is of iteration {done}, and the method makes {now}: raise iterations")
    method.load_state(document["method"])
    course = [(method.lr_factor(t), method.strength(t)) for t in range(done)]
    method.iterations = saved["iterations"]
    before = [(method.lr_factor(t), method.strength(t)) for t in range(done)]
    if course != before:
        schedules = [f"{k}={v!r}" for k, v in method.settings().items() if k.endswith("_schedule")]
        raise InputError(
            f"{checkpoint.path} was written with iterations={saved['iterations']} and the method has {now}, and "
            f"its rates depend on how many there are ({', '.join(schedules)}): resume with as many, or start anew "
            "from the weights that the run left"
        )
    return saved
