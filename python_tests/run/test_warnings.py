"""What a run says of itself: a sentence, a field and a warning for what was asked and did not happen."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from helpers.models import batches, make, samples
from helpers.outspoken import DATA, QUIET, Vector, cluster_batches, clusters, go, normed, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import SaliencyMask, Unlearner, UnlearningWarning, errors
from unlearn_ext.methods import parse
from unlearn_ext.run.signs import KEYS, Losses, bit_sums, growth, missed, unmet, unmoved, unseen_classes
from unlearn_ext.run.watching import Watching
from unlearn_ext.tasks import Classification


def test_a_run_as_any_other_has_nothing_to_say() -> None:
    assert go(QUIET).warnings == {}
    assert not missed({}) and missed({"momentum": "", "target": ""}) and not missed({"momentum": "", "unseen": ""})
    assert issubclass(UnlearningWarning, UserWarning) and errors.UnlearningWarning is UnlearningWarning


# --- Settings and data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["forget_alpha", "forget_lr", "forget_weight"])
def test_a_setting_that_forgets_nothing_is_said(setting: str) -> None:
    sentence = go(f"{QUIET},{setting}=0").warnings["strength"]
    assert setting in sentence and "no step forgets" in sentence
    assert "strength" not in go(f"{QUIET},{setting}=0.5").warnings


def test_rule_momentum_without_momentum() -> None:
    (sentence,) = go(f"{QUIET},rule=momentum,momentum=0").warnings.items()
    assert sentence[0] == "momentum" and "rule='momentum' with momentum=0 is plain gradient descent" in sentence[1]
    assert not go(f"{QUIET},rule=momentum").warnings and not go(f"{QUIET},rule=sgd").warnings


def of_classes(*classes: int, count: int = 24, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    images, _ = samples(count, seed)
    return [(images, torch.tensor(classes).repeat(count)[:count])]


@pytest.mark.parametrize("method", ["sfron:forget_alpha=auto,target_accuracy=0,gamma=none", "nabla_tau"])
def test_unseen_data_that_hold_the_forgotten_class(method: str) -> None:
    data = {"forget": of_classes(3, seed=1), "retain": of_classes(0, 1, 2, seed=2)}
    method += f"{',' if ':' in method else ':'}iterations=1,lr=1e-3"
    found = go(method, {**data, "unseen": of_classes(0, 1, 2, 3, seed=3)}).warnings
    assert "(label 3)" in found["unseen"]
    assert "unseen" not in go(method, {**data, "unseen": of_classes(0, 1, 2, seed=3)}).warnings


@pytest.mark.parametrize(
    ("forget", "retain", "unseen", "whole", "named"),
    [
        ({3}, {0, 1}, {0, 3}, True, "3"),
        ({3, 5}, {0, 1}, {0, 5}, True, "5"),
        ({3}, None, {3}, True, "3"),  # of a method without retain steps
        ({3}, {0, 1}, {0, 1}, True, None),
        ({0, 1, 3}, {0, 1}, {0, 1, 3}, True, None),  # random samples, where a small retain set lacks a class
        ({3, 5}, None, {3}, True, None),
        ({3, 5}, {0}, {3}, False, None),  # only a part of the retain set was seen
        ({3}, {0}, {3}, False, "3"),
        (set(), set(), set(), True, None),
    ],
)
def test_which_unseen_classes_are_named(forget, retain, unseen, whole, named) -> None:
    labels = {"forget": forget, "unseen": unseen} | ({} if retain is None else {"retain": retain})
    sentence = unseen_classes(labels, whole)
    assert sentence is None if named is None else f"(label {named})" in sentence


# --- Targets ----------------------------------------------------------------------------------------------------


def test_a_target_that_is_not_met() -> None:
    unseen = batches(4, 6, seed=6)
    settings = "forget_alpha=auto,gamma=none,iterations=2,calibrate_every=1,calibration_samples=16"
    found = go(f"sfron:{settings},target_accuracy=0.95,lr=1e-3", {**DATA, "unseen": unseen})
    assert not found.calibration["met"] and missed(found.warnings) and found.warnings["target"]


PATH = [
    {"iteration": 0, "accuracy": 1.0, "unseen_accuracy": 0.98, "distance": 0.5},
    {"iteration": 4, "accuracy": 0.375, "unseen_accuracy": 0.95, "distance": 0.25},
    {"iteration": 8, "accuracy": 0.5, "unseen_accuracy": 0.5, "distance": 0.3},
]


def test_the_sentence_is_of_the_weights_that_the_model_has() -> None:
    found = {"path": PATH, "ended_at": 4, "met": False}
    assert "after 4 iterations the forget set's accuracy is 0.375 where 0.1 was asked" in unmet(found, 0.1)
    assert "unseen data lost 3.0 points" in unmet(found, 0.1)
    assert "after 4 iterations the forget set's losses stand 0.25 from" in unmet(found, None)
    assert "nothing better than the starting weights" in unmet({**found, "ended_at": 0}, 0.1)
    assert unmet({**found, "met": True}, 0.1) is None


# --- Runs that move nothing -------------------------------------------------------------------------------------


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square()


def regression() -> dict[str, list]:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    return {"forget": [(x[:12], x[:12, 0])], "retain": [(x[12:], x[12:, 0])]}


@pytest.mark.parametrize(("decay", "says"), [(0.0, "no weight has moved in 5 it"), (1e-3, "forgetting moved nothing")])
def test_a_bad_teacher_on_a_regression(decay: float, says: str) -> None:
    """The softmax of a single output is 1, whoever gives it."""
    method = f"bad_teacher:iterations=5,lr=0.1,weight_decay={decay}"
    found = go(method, regression(), make(Vector), Classification(loss=squared))
    assert found.warnings["unmoved"].startswith(says) and "the forget term was 0" in found.warnings["unmoved"]


def test_a_learning_rate_of_zero() -> None:
    found = go("finetune:iterations=2,lr=0", {"retain": DATA["retain"]})
    assert found.warnings == {"unmoved": found.warnings["unmoved"]} and "lr is 0" in found.warnings["unmoved"]


@pytest.mark.parametrize("rounding", [False, True])
def test_steps_that_bfloat16_loses(rounding: bool) -> None:
    """All weights are 1, whose steps of 1e-4 are a fortieth of the distance to the next smaller number."""
    model = make(Vector, size=4).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = torch.arange(32) % 4
    data = {"forget": [(x[:16], y[:16])], "retain": [(x[16:], y[16:])]}
    method = f"sfron:gamma=none,rule=adam,lr=1e-4,iterations=5,stochastic_rounding={rounding}"
    found = go(method, data, model).warnings
    assert found == {} if rounding else "stochastic_rounding=True" in found["unmoved"]


def test_a_few_weights_are_enough_to_have_moved() -> None:
    model = make()
    chosen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    chosen["head.bias"][2] = True
    mask = SaliencyMask.from_dict(chosen)
    method = parse("random_label", mask=mask, mask_scope="all", protect=True, iterations=2, lr=1e-3)
    found = go(method, model=model)
    assert found.moved_protected == 0 and found.warnings == {}


def test_a_forget_loss_that_the_trained_weights_do_not_reach() -> None:
    class Apart(nn.Module):
        """Samples of a first number above 0 take the frozen way."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = nn.Linear(8, 4).requires_grad_(False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, self.frozen(x) + 0 * self.trained(x), self.trained(x))

    x, y = torch.randn(48, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 4
    front = x[:, 0] > 0
    data = {"forget": [(x[front], y[front])], "retain": [(x[~front], y[~front])]}
    found = go("negative_gradient_plus:iterations=3,lr=0.1", data, make(Apart)).warnings
    assert found["unmoved"].startswith("the forget loss is to the last digit what it was")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"iterations": 0, "still": True}, None),
        ({"still": True}, "raise lr, or look"),
        ({"still": True, "lr": 0.0}, "lr is 0"),
        ({"still": True, "half": True}, "stochastic_rounding"),
        ({"still": True, "steps": 0}, "gradient overflowed"),
        ({"still": True, "pull": 0.0}, "the forget term was 0"),
        ({"pull": 0.0}, "forgetting moved nothing: the forget term was 0"),
        ({"pull": None}, None),
        ({"same": True}, "the forget loss is to the last digit"),
    ],
)
def test_the_sentence_on_what_did_not_move(changes: dict, says: str | None) -> None:
    usual = {"iterations": 3, "still": False, "steps": 6, "lr": 0.1, "half": False, "pull": 1.0, "same": False}
    settings = {**usual, **changes}
    found = unmoved(settings.pop("iterations"), **settings)
    assert found is None if says is None else says in found


def test_the_sums_of_bits_see_one_bit_two_that_cancel_and_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight = torch.full((3, 4), 1.5, dtype=dtype)
        before = bit_sums([weight, torch.ones((), dtype=dtype), torch.ones(0, dtype=dtype)])
        assert before == bit_sums([weight.clone(), torch.ones((), dtype=dtype), torch.ones(0, dtype=dtype)])
        unit = torch.finfo(dtype).eps
        for changed in ([(0, unit)], [(5, -unit)], [(0, unit), (1, -unit)], [(3, unit), (7, -unit)], [(11, unit)]):
            other = weight.clone()
            for at, by in changed:
                other.view(-1)[at] += by
            assert bit_sums([other])[0] != before[0], (dtype, changed)


# --- Retain losses that multiply --------------------------------------------------------------------------------


def losses(*values: float) -> Losses:
    found = Losses()
    for value in values:
        found.add(torch.tensor(value))
    return found


@pytest.mark.parametrize(
    ("before", "values", "nats", "warned"),
    [
        ([0.005, 0.01], [0.3, 1.0, 2.0, 2.2, 2.2, 2.2, 2.2], True, True),
        ([0.005, 0.006], [0.01, 0.02, 0.05, 0.1, 0.1, 0.1, 0.1], True, False),  # twenty times, and still right
        ([0.5, 0.6], [1.0, 0.9, 1.0, 1.1, 1.0, 1.2, 1.1], True, False),  # twice
        ([0.005, 0.005], [2.0, 3.0, 1.0, 0.1, 0.01, 0.01, 0.01], True, False),  # which retain steps have mended
        ([0.005, 0.01], [0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 9.0], True, False),  # a single batch
        ([2.3, 2.3], [2.3, 2.3, 2.3], True, False),
        ([0.01, 0.02], [5.0, 5.1, 5.0, 4.9], True, True),  # wrecked by the first step
        ([0.01, 0.02], [5.0], True, True),
        ([], [0.01, 5.0, 5.0], True, False),  # of a method without retain steps, or an older checkpoint
        ([0.01, 0.02], [], True, False),
        ([0.02, 0.05, 0.01, 0.03, 0.02], [0.3, 0.4, 0.3, 0.5, 0.2, 0.3, 0.3, 0.3, 0.4, 0.3], False, True),
        ([0.002, 0.2, 0.01, 0.003, 0.02], [0.3, 0.01, 0.3, 0.2, 0.2, 0.3, 0.3, 0.1, 0.4, 0.3], False, False),  # noise
        ([0.02, 0.02, 0.02, 0.02, 0.02], [0.9, 0.9], False, False),  # too few to tell
    ],
)
def test_when_a_retain_loss_has_multiplied(before: list, values: list, nats: bool, warned: bool) -> None:
    found = growth(before, losses(*values), nats)
    assert (found is not None) == warned
    if warned:
        assert "the retain loss went from" in found


def test_a_run_that_destroys_what_was_to_be_kept() -> None:
    x, y = clusters(120)
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), x, y)
    chosen = y == 3
    data = {"forget": [(x[chosen], y[chosen])], "retain": [(x[~chosen], y[~chosen])]}
    found = go("sfron:gamma=none,lr=0.5,momentum=0.9,iterations=30", data, model)
    right = (model(x[~chosen]).argmax(1) == y[~chosen]).double().mean()
    assert "retain" in found.warnings and right < 0.95
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), x, y)
    found = go("sfron:gamma=none,lr=0.05,iterations=30,max_norm=1", data, model)
    right = (model(x[~chosen]).argmax(1) == y[~chosen]).double().mean()
    assert found.warnings == {} and right > 0.95


def net() -> nn.Module:
    """Dropout draws and batch normalisation counts in train mode, and a forward pass writes a table."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.table.add_(1)
            return super().forward(x)

    torch.manual_seed(0)
    model = Net(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
    model.register_buffer("table", torch.zeros(()))
    return model


@pytest.mark.parametrize(
    ("method", "iterations"),
    [
        ("sfron:gamma=none", 4),
        ("sfron:gamma=1", 4),
        ("negative_gradient_plus", 4),
        ("sfron:gamma=none,update=joint", 4),
    ],
)
def test_a_run_that_its_first_step_wrecks(method: str, iterations: int) -> None:
    """All recorded losses are as large as the first, which is taken after that step."""
    x, y = clusters(120)
    chosen = y == 3
    data = {"forget": [(x[chosen], y[chosen])], "retain": [(x[~chosen], y[~chosen])]}
    method += f"{',' if ':' in method else ':'}iterations={iterations}"
    sentence = go(f"{method},lr=30", data, trained(net(), x, y)).warnings["retain"]
    start, end = re.match(r"the retain loss went from (\S+) to (\S+),", sentence).groups()
    assert float(start) < 0.5 and float(end) > 100
    assert "retain" not in go(f"{method},lr=1e-4", data, trained(net(), x, y)).warnings


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_look_before_the_first_step_changes_nothing(mode: bool, shuffle: bool, monkeypatch) -> None:
    """Not a bit of weights, statistics, batches or generators."""
    begin, before, ends = Watching.begin, [], []
    for looks in (True, False):
        model = net().train(mode)
        data = {
            name: DataLoader(TensorDataset(*clusters(count, seed=count)), batch_size=8, shuffle=shuffle)
            for name, count in (("forget", 16), ("retain", 48))
        }

        def watched(self: Watching, looks: bool = looks) -> None:
            if looks:
                begin(self)
            before.append(self.before)

        monkeypatch.setattr(Watching, "begin", watched)
        found = go(f"{QUIET},momentum=0.9", data, model)
        ends.append((found.history, {**model.state_dict(), "generator": torch.get_rng_state()}))
    assert [len(losses) for losses in before] == [2, 0] and ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_what_is_looked_at_are_the_first_retain_batches_in_train_mode(monkeypatch) -> None:
    model, before = normed().eval(), []
    expected = [nn.functional.cross_entropy(copy.deepcopy(model).train()(x), y) for x, y in cluster_batches()]
    begin = Watching.begin
    monkeypatch.setattr(Watching, "begin", lambda self: (begin(self), before.extend(self.before)))
    go(f"{QUIET}", {"forget": [clusters(8)], "retain": cluster_batches()}, model)
    assert [float(loss) for loss in before] == pytest.approx([loss.item() for loss in expected], rel=1e-6)


# --- Runs that are cut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [5, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 14))])
@pytest.mark.parametrize("case", ["still", "grown"])
def test_a_resumed_run_says_what_the_whole_one_says(at: int, case: str, tmp_path) -> None:
    x, y = clusters(120)
    chosen = y == 3
    data = {"forget": [(x[chosen], y[chosen])], "retain": [(x[~chosen], y[~chosen])]}
    method = {"still": "sfron:gamma=none,lr=0", "grown": "sfron:gamma=none,lr=0.5,momentum=0.9,forget_alpha=3"}[case]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return trained(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), x, y)

    def stop(model: nn.Module, iterations: int) -> bool:
        raise KeyboardInterrupt

    method += ",iterations=14"
    whole = go(method, data, network())
    assert set(whole.warnings) == {{"still": "unmoved", "grown": "retain"}[case]}
    settings = {"output_dir": tmp_path, "checkpointing_steps": 1}
    if at < 14:
        with pytest.raises(KeyboardInterrupt):
            go(method, data, network(), evaluate=stop, evaluate_every=at + 1, **settings)
    else:
        go(method, data, network(), **settings)
    resumed = go(method, data, network(), resume_from_checkpoint=tmp_path / f"checkpoint-{at}", **settings)
    assert resumed.warnings == whole.warnings


# --- Representation ---------------------------------------------------------------------------------------------


def shown(result) -> str:
    text = repr(result)
    assert len(text) < 1000
    return text


def test_a_result_is_shown_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    unlearner = Unlearner(make(), Classification(), "sfron:iterations=300,lr=1e-4", ema_decay=0.9)
    result = unlearner.run(**DATA)

    def refuse(*arguments: object, **settings: object) -> str:
        raise AssertionError("a tensor is printed")

    monkeypatch.setattr(Tensor, "__repr__", refuse)
    text = shown(result)
    first, last = result.history[0], result.history[-1]
    assert text.startswith("Result(300 iterations (sequential, ")
    assert f"retain_loss: {first['retain_loss']:.4g} -> {last['retain_loss']:.4g}" in text
    assert f"forget_loss: {first['forget_loss']:.4g} -> {last['forget_loss']:.4g}" in text
    assert f"mask: {100 * result.mask.density:.3g} % of {result.counts['trainable_weights']} weights" in text
    assert "seconds: fisher" in text and "ema: 6 tensors" in text and str(result) == text
    result.warnings = dict.fromkeys(KEYS, "x" * 300)
    assert "warning, target: xxx" in shown(result)


CASES: dict[str, Callable] = {
    "empty": lambda: type(go(QUIET))(),
    "calibrated": lambda: go(
        "sfron:forget_alpha=auto,gamma=none,iterations=60,lr=1e-12,calibration_samples=16,calibrate_every=1",
        {**DATA, "unseen": batches(4, 6, seed=6)},
    ),
    "finetune": lambda: go("finetune:iterations=1,lr=1e-3", {"retain": DATA["retain"]}),
    "learning": lambda: go("ug_clu:gamma=none,lr=1e-3,iterations=2", {**DATA, "learn": batches(2, 6, seed=5)}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_result_is_short(case: str) -> None:
    text = shown(CASES[case]())
    assert text.startswith("Result(") and text.endswith(")")
