"""The data of a run: passes over them, samples in both sets, labels, batches of the wrong form."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import Counting, identical, method, run, weights
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.tasks import Classification


def test_one_shot_iterators_are_refused() -> None:
    model = make()
    before = weights(model)
    data = {"forget": iter(batches(3, 6, seed=1)), "retain": batches(5, 6, seed=2)}
    with pytest.raises(InputError, match="one-shot iterator"):
        run(model, data)
    with pytest.raises(InputError, match="no iterable"):
        run(model, {**data, "forget": 5})
    assert identical(before, weights(model))


def test_one_eval_pass_first_and_then_fresh_passes() -> None:
    modes: list[bool] = []

    class Watching(ConvNet):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    forget, retain = Counting(batches(3, 6, seed=1)), Counting(batches(5, 6, seed=2))
    run(make(Watching), {"forget": forget, "retain": retain})
    # Each first pass begins with one forward pass more, which tells the number of classes.
    assert modes[:10] == [False] * 10 and all(modes[10:30])  # two of them before the first step
    assert modes[30:] == [False] * 2  # the last forget batch's loss and accuracy, for the batch normalisation
    assert forget.passes == 1 + 2 and retain.passes == 1 + 3  # 6 of 3, 12 of 5


@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("gamma", [1.0, None])
def test_empty_sets_are_refused(which, gamma) -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2), which: []}
    model = make()
    before = weights(model)
    with pytest.raises(InputError, match=f"the {which} set is empty"):
        run(model, data, {"gamma": gamma})
    assert identical(before, weights(model))


@pytest.mark.parametrize("gamma", [1.0, None])
def test_samples_in_both_sets_are_refused(gamma) -> None:
    forget, retain = batches(3, 6, seed=1), batches(5, 6, seed=2)
    retain[2][0][4] = forget[1][0][0]  # sample 2 * 6 + 4
    model = make()
    with pytest.raises(InputError, match=r"sample 16 of the retain set is also in the forget set.*allow.duplicates"):
        run(model, {"forget": forget, "retain": retain}, {"gamma": gamma})
    assert identical(weights(model), weights(make()))
    assert run(model, {"forget": forget, "retain": retain}, allow_duplicates=True).counts["iterations"] == 12


def test_the_whole_set_cannot_be_forgotten() -> None:
    everything = batches(3, 6, seed=1)
    with pytest.raises(InputError, match="also in the forget set"):
        run(make(), {"forget": everything, "retain": everything})


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label) -> None:
    for batch in (0, 2):  # seen first by the model, or first by the loader
        retain = batches(5, 6, seed=2)
        retain[batch][1][3] = label
        with pytest.raises(InputError, match=rf"label {label} is outside the model's 4 classes"):
            run(make(), {"forget": batches(3, 6, seed=1), "retain": retain})


def test_labels_that_only_a_loss_of_ones_own_understands() -> None:
    """Such as ignore_index=-100: what they mean is the loss's affair."""
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    data["retain"][2][1][3] = -100
    loss = nn.CrossEntropyLoss(reduction="none")
    assert Unlearner(make(), Classification(loss=loss), method()).run(**data).counts["iterations"] == 12


def test_the_first_pass_over_the_data_only_checks_it() -> None:
    prepared = []  # no number of the task's, which looks put back

    class Counting(Classification):
        def prepare(self, batch, device):
            prepared.append(batch)
            return super().prepare(batch, device)

    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    Unlearner(make(), Counting(), method(gamma=None, iterations=2)).run(**data)
    # To learn the classes, once a set; two retain batches before the first step; one forget and two retain batches; the
    # last forget batch in eval mode, twice.
    assert len(prepared) == 2 + 2 + 3 + 2


def test_batches_of_the_wrong_form() -> None:
    good = batches(3, 6, seed=1)
    for bad, words in (
        ([torch.zeros(6, 2, 5, 5)], "a batch is"),
        ([{"images": torch.zeros(1)}], "pixel_values and labels, all tensors; got a dict of images"),
        ([(torch.zeros(6, 2, 5, 5), torch.zeros(5, dtype=torch.int64))], "6 inputs and 5 labels"),
        ([(torch.zeros(6, 2, 5, 5), torch.zeros(6))], "expected integers of shape"),
    ):
        with pytest.raises(InputError, match=words):
            run(make(), {"forget": bad, "retain": good})
