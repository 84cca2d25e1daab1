"""Settings and runs that calibrated forgetting refuses."""

from __future__ import annotations

import pytest
from helpers.calibrated import SHORT, run, sets
from helpers.models import make
from torch import nn

from unlearn_ext import InputError, NonFiniteError, Unlearner
from unlearn_ext.methods import RandomLabel, SFRon
from unlearn_ext.tasks import Classification, Task


class Diffusion(Task):
    """A task without labels."""

    def prepare(self, batch, device):
        return batch

    def losses(self, model, batch):
        raise NotImplementedError

    def inputs(self, batch):
        return batch


@pytest.mark.parametrize(
    ("make_method", "words"),
    [
        (lambda: RandomLabel(forget_alpha="auto"), "random_label descends towards a replacement: give a number"),
        (lambda: SFRon(forget_alpha="auto", forget_term="replace"), "sfron descends towards a replacement"),
        (lambda: SFRon(forget_alpha="strong"), "^forget_alpha: expected a number or 'auto', got 'strong'"),
        (lambda: SFRon(forget_alpha="auto", calibrate_every=0), "^calibrate_every"),
        (lambda: SFRon(forget_alpha="auto", target_accuracy=1.5), "^target_accuracy: expected a number from 0 to 1"),
        (lambda: SFRon(forget_alpha=2.0, target_accuracy=0.0), "^target_accuracy is what forget_alpha='auto' steers"),
        (lambda: SFRon(forget_alpha="auto", calibration_samples=15), "^calibration_samples: expected 16 or more"),
    ],
)
def test_settings_that_cannot_be(make_method, words) -> None:
    with pytest.raises(InputError, match=words):
        make_method()


def test_runs_that_cannot_be(tmp_path) -> None:
    data = sets()
    with pytest.raises(InputError, match=r"^sfron takes an unseen set"):
        run(SFRon(**SHORT), {**data, "unseen": None})
    with pytest.raises(InputError, match=r"makes no checkpoints"):
        run(SFRon(**SHORT), output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(InputError, match="has 12 unseen samples to learn from: pass 16 or more"):
        run(SFRon(**SHORT), {**data, "unseen": data["unseen"][:2]})
    with pytest.raises(InputError, match="does not add up over batches"):
        Unlearner(make(), Classification(), SFRon(**SHORT), gradient_accumulation_steps=2)
    own = Classification(lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none"))
    with pytest.raises(InputError, match=r"^target_accuracy goes with the cross-entropy: leave"):
        Unlearner(make(), own, SFRon(**SHORT, target_accuracy=0.0))
    with pytest.raises(InputError, match=r"^Diffusion has no accuracy .*: leave target_accuracy out"):
        Unlearner(make(), Diffusion(), SFRon(**SHORT, target_accuracy=0.0))
    images, labels = data["unseen"][0]
    data["unseen"] = [(images * float("nan"), labels), *data["unseen"][1:]]
    with pytest.raises(NonFiniteError, match="a loss on unseen data is not finite"):
        run(SFRon(**SHORT), data)
