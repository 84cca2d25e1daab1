"""What a run takes from an earlier one, its mask or its checkpoint, and whether it belongs to this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..distributed.hashing import weights_hash
from ..errors import InputError
from ..run import checkpoint_folder
from ..run.unlearner import Unlearner
from ..saliency import SaliencyMask

__all__ = ["check_mask", "check_resumed"]

# What the unlearner says of another --max-train-steps, of which the schedule and the drawn images are made.
_OTHER_LENGTH = re.compile(r"was written with (iterations|max_train_steps)=|: raise iterations$")
_ANEW = "leave it out and a new one is measured"


def check_mask(mask: SaliencyMask, file: Path, forget_set: Mapping[str, str], trained: Mapping[str, Tensor]) -> None:
    """Whether a mask says of itself that it was made for this forget set and these weights.

    Args:
        file: where it was read.
        forget_set: what its metadata should say of the forget set.
        trained: the weights that may move, by name.
    """
    for key, value in forget_set.items():
        if mask.metadata.get(key, value) != value:
            raise InputError(f"--mask: {file} was made for another forget set ({key} differ): {_ANEW}")
    identity = {**forget_set, "weights_hash": weights_hash(trained.items())}
    unsaid = {key: value for key, value in identity.items() if key not in mask.metadata}
    if unsaid:  # one that was made in Python or by other code: whether it belongs here is the user's word
        raise InputError(
            f"--mask: {file} does not say what it was made for: {_ANEW}, or, if it is of this forget set and model, "
            f"save it with metadata.update({unsaid})"
        )
    if mask.metadata["weights_hash"] != identity["weights_hash"]:
        raise InputError(f"--mask: {file} was made for other weights: {_ANEW}")
    try:
        mask.bind(trained.items())
    except InputError:
        raise InputError(f"--mask: {file} is not of the weights that are trained: {_ANEW}") from None


def check_resumed(unlearner: Unlearner, folder: Path, choice: str) -> None:
    """Whether there is a checkpoint, and a run with these settings can go on from it.

    Args:
        folder: of the checkpoints.
        choice: ``latest`` or a path.
    """
    try:
        checkpoint_folder.candidates(folder, choice)
    except InputError as error:
        raise InputError(f"{error}: leave out --resume-from-checkpoint to start anew") from None
    try:
        unlearner.open_checkpoint(folder, choice)
    except InputError as error:
        if not _OTHER_LENGTH.search(str(error)):
            raise
        raise InputError(
            f"{error}; --max-train-steps cannot change in mid-run, because its batches and its schedule were made for "
            "all of its steps: for more, let it end, and forget again from the model that it writes"
        ) from None
