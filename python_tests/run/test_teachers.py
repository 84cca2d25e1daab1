"""Frozen copies of models whose modules hold computed tensors."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
from helpers.models import batches
from helpers.runs import identical, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import BadTeacher, Scrub
from unlearn_ext.run.teachers import make_teachers
from unlearn_ext.tasks import Classification

DATA = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}


class Remembering(nn.Module):
    """Keeps what its passes computed."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(50, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["out"] = [self.head(x.flatten(1))]
        return self.seen["out"][0]


def flat(change) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 4))
    change(model)
    return model


def old_norms(model: nn.Module) -> None:
    nn.utils.weight_norm(model[1])
    nn.utils.spectral_norm(model[4])


def new_norms(model: nn.Module) -> None:
    parametrizations.weight_norm(model[1])
    parametrizations.spectral_norm(model[4])


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[1], "weight", 0.5)


CHANGES = [old_norms, new_norms, pruned]


def moved_on(model: nn.Module, x: Tensor) -> nn.Module:
    """Moves the weights; a teacher made before answers as the model did then."""
    expected = model(x).detach()
    (teacher,) = make_teachers(model, Scrub()).values()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(teacher(x), expected) and not torch.equal(model(x), expected)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher(x).requires_grad
    return teacher


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_teacher_answers_as_the_model_did(change) -> None:
    model, x = flat(change), DATA["forget"][0][0]
    model(x).sum().backward()  # after a pass, weights stand there that autograd has computed
    before = weights(model.eval())
    assert identical(weights(moved_on(model, x)), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_a_teacher_resumes(change, tmp_path) -> None:
    def trained(**arguments) -> dict:
        model = flat(change)
        model(DATA["forget"][0][0])
        torch.manual_seed(4)
        Unlearner(model, Classification(), Scrub(epochs=2, msteps=1, lr=0.05)).run(**DATA, **arguments)
        return weights(model)

    whole = trained(output_dir=tmp_path, checkpointing_steps=3)
    assert identical(whole, trained(output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-3"))


def test_activations_that_a_model_keeps_are_copied() -> None:
    model = Remembering()
    model(DATA["forget"][0][0])
    Unlearner(model, Classification(), Scrub(epochs=1, msteps=1, lr=0.05)).run(**DATA)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_random_weights_that_would_not_be_drawn_are_refused(change) -> None:
    model = flat(change)
    message = r"the weights of 1 are computed from others .* which reset_parameters does not draw: pass random_model"
    with pytest.raises(InputError, match=message):
        Unlearner(model, Classification(), BadTeacher())
    untrained = copy.deepcopy(flat(lambda model: None))
    Unlearner(model, Classification(), BadTeacher(random_model=untrained, iterations=2)).run(**DATA)


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
def test_scripted_layers_cannot_be_drawn_anew() -> None:
    with pytest.raises(InputError, match=r"1 .* has no reset_parameters to draw them"):
        Unlearner(torch.jit.script(flat(lambda model: None)), Classification(), BadTeacher())


class Uncopied(Tensor):
    """Whose class tells torch too little to copy it."""


def test_tensors_of_a_class_that_is_not_copied_are_refused() -> None:
    model = flat(lambda model: None)
    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Uncopied))
    with pytest.raises(InputError, match="Python cannot copy it"):
        make_teachers(model, Scrub())


def test_outputs_that_are_not_compared_are_told_from_those_without_a_loss() -> None:
    task = Classification(loss=lambda outputs, labels: outputs.flatten(1).mean(1))
    model = flat(lambda model: model.append(nn.Unflatten(1, (2, 2))))
    with pytest.raises(InputError, match="choose a method that compares no outputs"):
        Unlearner(model, task, Scrub(epochs=1, msteps=1)).run(**DATA)


def closure(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: before(x)


def compiled(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("change", [closure, compiled])
@pytest.mark.parametrize("kind", [Scrub, BadTeacher])
def test_a_forward_that_a_copy_would_share_is_refused(change, kind) -> None:
    for place in ("4", "the model"):
        model = flat(lambda model, place=place: change(model[4] if place == "4" else model))
        before = weights(model)
        with pytest.raises(InputError, match=rf"the forward of {place} was replaced by a function.*model\.compile\(\)"):
            Unlearner(model, Classification(), kind(epochs=1, **({"msteps": 1} if kind is Scrub else {}))).run(**DATA)
        assert identical(weights(model), before)


def with_a_compiled_block(model: nn.Module) -> nn.Module:
    model[4] = torch.compile(model[4], backend="eager")
    return model


def compiled_as_a_whole(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("wrap", [with_a_compiled_block, compiled_as_a_whole, torch.jit.script])
def test_compiled_and_scripted_models_have_teachers(wrap) -> None:
    moved_on(wrap(flat(lambda model: None)).eval(), DATA["forget"][0][0])


def test_a_forward_that_belongs_to_its_module_is_copied() -> None:
    def doubled(self, x: Tensor) -> Tensor:
        return 2 * type(self).forward(self, x)

    model = flat(lambda model: None)
    model[1].forward = types.MethodType(doubled, model[1])
    model[4].forward = functools.partial(doubled, model[4])  # as accelerate's hooks have it
    model.eval()
    Unlearner(model, Classification(), Scrub())
    moved_on(model, DATA["forget"][0][0])


def run_with(model: nn.Module, method: BadTeacher) -> None:
    data = {"forget": batches(2, 4, seed=1), "retain": batches(2, 4, seed=2)}
    Unlearner(model, Classification(), method).run(**data)


def test_teachers_that_do_not_fit_are_refused_in_one_sentence() -> None:
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(50, classes)) for classes in (4, 7))
    before = weights(model)
    with pytest.raises(InputError, match=r"gives logits of shape \[4, 7\] and the model \[4, 4\]"):
        run_with(model, BadTeacher(random_model=other, epochs=1))
    with pytest.raises(InputError, match=r"weight is on the meta device"):
        run_with(model, BadTeacher(random_model=copy.deepcopy(model).to("meta"), epochs=1))
    model.lock = threading.Lock()
    with pytest.raises(InputError, match=r"keeps a frozen copy of the model.*lock"):
        run_with(model, BadTeacher(epochs=1))
    assert identical(weights(model), before)
