"""UnlearnOptimizer beside torch.optim's own optimizers: schedulers, settings, hooks and wrappers."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from unlearn_ext.errors import InputError
from unlearn_ext.optim import StepConfig, UnlearnOptimizer

Optimizer = torch.optim.Optimizer
OTHERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.99)}),
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.99)}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def pair(rule: str, **common: Any) -> list[tuple[nn.Module, Optimizer]]:
    """A network with our optimizer, and the same one with torch's."""
    kind, options = OTHERS[rule]
    common = {"lr": 0.05, "weight_decay": 0.01, **options, **common}
    ours, theirs = network(), network()
    other = copy.deepcopy(common)  # schedulers write into a rate that is a tensor
    return [
        (ours, UnlearnOptimizer(ours.parameters(), rule=rule, **common)),
        (theirs, kind(theirs.parameters(), **other)),
    ]


def backward(model: nn.Module, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    loss = model(torch.randn(8, 4, generator=rng, dtype=torch.float64)).square().mean()
    loss.backward()
    return loss.detach()


def assert_alike(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


# --- Schedulers -----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "OneCycleLR, three phases": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=12, three_phase=True),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.StepLR(o, 4)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


@pytest.mark.parametrize("rate", (float, torch.tensor), ids=("float", "tensor"))
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("rule", OTHERS)
def test_schedulers_drive_it_as_torchs_own(rule: str, make: Callable, rate: Callable) -> None:
    if rate is torch.tensor:
        rate = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731 - float32 would differ by its rounding
    traces, models = [], []
    for model, optimizer in pair(rule, lr=rate(0.05)):
        scheduler, trace = make(optimizer), []
        for t in range(12):
            optimizer.zero_grad()
            loss = backward(model, t)
            optimizer.step()
            group = optimizer.param_groups[0]
            trace.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scheduler.step(loss) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()
        traces.append(trace)
        models.append(model)
    for ours, theirs in zip(*traces, strict=True):
        assert ours == pytest.approx(theirs) if ours[2] is None else ours[0] == pytest.approx(theirs[0])
        assert ours[2] == (None if theirs[2] is None else pytest.approx(theirs[2]))
    assert_alike(*models)


def test_the_plain_rule_has_nothing_to_cycle() -> None:
    optimizer = UnlearnOptimizer(network().parameters(), rule="sgd", lr=0.1)
    with pytest.raises(ValueError, match="cycle_momentum"):
        schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)


def test_forget_lr_keeps_its_ratio_under_one_cycle() -> None:
    """The schedule begins far below the rate that it reaches; the forget rate follows at the same distance."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.1, forget_lr=0.05)
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=False)
    for _ in range(8):
        before = p.item()
        optimizer.forget_step([torch.ones(1, dtype=torch.float64)])
        assert before - p.item() == pytest.approx(0.5 * optimizer.param_groups[0]["lr"])
        scheduler.step()


# --- Settings -------------------------------------------------------------------------------------------------

COMMON = {"lr", "weight_decay", "forget_weight", "retain_weight", "slow_rate", "forget_lr"}
COMMON |= {"retain_steps", "rounding_seed"}


@pytest.mark.parametrize(
    "options, more",
    [
        ({"rule": "sgd"}, set()),
        ({"rule": "momentum"}, {"momentum"}),
        ({"rule": "adam"}, {"betas", "eps"}),
        ({"rule": "adamw"}, {"betas", "eps"}),
        ({"rule": "momentum", "dual_state": True, "forget_rule": "adam"}, {"momentum", "betas", "eps"}),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "momentum-adam"],
)
def test_defaults_hold_what_the_rules_read(options: dict[str, Any], more: set[str]) -> None:
    optimizer = UnlearnOptimizer(network().parameters(), lr=0.1, **options)
    assert set(optimizer.defaults) == COMMON | more
    assert set(optimizer.param_groups[0]) - {"params"} == COMMON | more
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.defaults) == COMMON | more


@pytest.mark.parametrize(
    "betas",
    [(0.5, 0.75), [0.5, 0.75], np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]), (torch.tensor(0.5), np.float32(0.75))],
    ids=("tuple", "list", "array", "tensor", "mixed"),
)
def test_betas_of_any_sequence(betas: Any) -> None:
    optimizer = UnlearnOptimizer(network().parameters(), rule="adam", lr=0.1, betas=betas)
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.5, 0.75) and type(group["betas"]) is tuple and type(group["betas"][1]) is float
    assert StepConfig(rule="adam", betas=betas).betas == (0.5, 0.75)
    other = UnlearnOptimizer([{"params": network().parameters(), "betas": betas}], rule="adam", lr=0.1)
    assert other.param_groups[0]["betas"] == (0.5, 0.75)
    results = []
    for value in ((0.5, 0.75), betas):  # put there afterwards, as torch allows
        model = network()
        optimizer = UnlearnOptimizer(model.parameters(), rule="adam", lr=0.1)
        optimizer.param_groups[0]["betas"] = value
        for t in range(2):
            backward(model, t)
            optimizer.step()
        results.append(model)
    assert_alike(*results)


@pytest.mark.parametrize("betas", ({0.5, 0.75}, {0.5: 0, 0.75: 1}, "01", (0.5, 0.6, 0.7), (0.5, 1j), None), ids=str)
def test_other_betas_are_refused(betas: Any) -> None:
    with pytest.raises(InputError, match=r"^betas: expected two numbers in \[0, 1\)"):
        UnlearnOptimizer(network().parameters(), rule="adam", lr=0.1, betas=betas)


@pytest.mark.parametrize("rule", OTHERS)
def test_groups_may_be_edited_afterwards(rule: str) -> None:
    models = []
    for model, optimizer in pair(rule):
        for t in range(6):
            optimizer.zero_grad(set_to_none=False)
            backward(model, t)
            optimizer.step()
            group = optimizer.param_groups[0]
            group["lr"], group["weight_decay"] = 0.1 / (t + 1), 0.02 * t
            if rule == "momentum":
                group["momentum"] = 0.3 * (t % 3)  # 0 leaves the buffers as they are
            else:
                group["betas"] = (0.1 * t, 0.9)
        models.append(model)
    assert_alike(*models)


def test_unknown_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'foreach'"):
        UnlearnOptimizer(network().parameters(), rule="adam", lr=0.1, foreach=True)
    with pytest.raises(InputError, match=r"^maximize is no setting of a parameter group"):
        UnlearnOptimizer([{"params": network().parameters(), "maximize": True}], rule="adam", lr=0.1)


def test_groups_of_another_optimizer_are_taken_over() -> None:
    """``type(optimizer)(optimizer.param_groups)``, with what schedulers and steps have left in them."""
    (model, optimizer), _ = pair("momentum")
    schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    backward(model, 0)
    optimizer.step()
    other = UnlearnOptimizer(optimizer.param_groups, rule="momentum", lr=1.0)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("dtype", (torch.complex64, torch.float8_e4m3fn), ids=str)
def test_parameters_that_cannot_be_moved_are_named(dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.ones(2).to(dtype))
    with pytest.raises(InputError, match=f"^the parameter phase is of {dtype}"):
        UnlearnOptimizer([("phase", odd)], rule="sgd", lr=0.1)
    optimizer = UnlearnOptimizer([("plain", nn.Parameter(torch.ones(2)))], rule="sgd", lr=0.1)
    with pytest.raises(InputError, match=f"^the parameter phase is of {dtype}"):
        optimizer.add_param_group({"params": [("phase", odd)]})
    assert len(optimizer.param_groups) == 1
    frozen = ("phase", odd.requires_grad_(False))
    UnlearnOptimizer([("plain", nn.Parameter(torch.ones(2))), frozen], rule="sgd", lr=0.1)


def test_a_group_that_shares_memory_cannot_join() -> None:
    buffer = torch.zeros(6)
    optimizer = UnlearnOptimizer([nn.Parameter(buffer[:4])], rule="sgd", lr=0.1)
    with pytest.raises(InputError, match=r"clone\(\) one"):
        optimizer.add_param_group({"params": [nn.Parameter(buffer[2:])]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ("sparse", "complex"))
@pytest.mark.parametrize("step", ("forget_step", "retain_step", "joint_step"))
def test_gradients_that_cannot_be_read_are_named(step: str, kind: str) -> None:
    named = [("first", nn.Parameter(torch.ones(2, 3))), ("second", nn.Parameter(torch.ones(2, 3)))]
    optimizer = UnlearnOptimizer(named, rule="adam", lr=0.1)
    good = torch.ones(2, 3)
    grads = [good, good.to_sparse() if kind == "sparse" else good.to(torch.complex64)]
    with pytest.raises(InputError, match=f"_step: the gradient of second is (of torch.)?{kind}"):
        if step == "joint_step":
            optimizer.joint_step([good, good], grads)
        else:
            getattr(optimizer, step)(grads)
    assert not optimizer.state and all(torch.equal(p.detach(), good) for _, p in named)


# --- State ----------------------------------------------------------------------------------------------------


def by_name(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state in the order of the optimizer's names, as torch's documentation advises."""
    places = {
        n: i for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)
    }
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    group = {**saved["param_groups"][0], "params": [*range(len(names))], "param_names": names}
    state = {i: saved["state"][places[name]] for i, name in enumerate(names)}
    return {**saved, "state": state, "param_groups": [group]}


def test_load_hooks_change_and_see_the_whole_state() -> None:
    named = [("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(2, 2)))]
    first = UnlearnOptimizer(named, rule="adam", lr=0.1)
    first.retain_step([torch.full((3,), 2.0), torch.full((2, 2), 5.0)])
    second = UnlearnOptimizer(named[::-1], rule="adam", lr=0.3)
    seen: list[Any] = []
    second.register_load_state_dict_pre_hook(by_name)
    second.register_load_state_dict_pre_hook(lambda o, saved: seen.append((set(saved), len(saved["state"]))))
    second.register_load_state_dict_post_hook(lambda o: seen.append({k: len(v) for k, v in o.state.items()}))
    second.load_state_dict(first.state_dict())
    assert seen == [({"state", "param_groups", "settings"}, 2), {p: 3 for _, p in named}]
    for _, p in named:
        assert torch.equal(first.state[p]["exp_avg"], second.state[p]["exp_avg"])
    assert second.param_groups[0]["lr"] == 0.1
    second.load_state_dict(first.state_dict())  # hooks stay, ours are not left behind
    assert len(seen) == 4 and len(second._optimizer_load_state_dict_pre_hooks) == 2


def test_a_load_hook_may_change_entries_in_place() -> None:
    (model, optimizer), _ = pair("momentum")
    backward(model, 0)
    optimizer.step()

    def halve(o: Optimizer, saved: dict[str, Any]) -> None:
        saved["state"] = {
            i: {k: v / 2 if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in saved["state"].items()
        }

    other = UnlearnOptimizer(network().parameters(), rule="momentum", lr=0.1)
    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(p["momentum_buffer"] / 2, q["momentum_buffer"])


def test_state_dict_hooks_see_and_may_replace_all_of_it() -> None:
    optimizer = UnlearnOptimizer(network().parameters(), rule="adam", lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.25))
    optimizer.register_state_dict_post_hook(lambda o, saved: {"all": saved, "extra": 1})
    saved = optimizer.state_dict()
    assert set(saved) == {"all", "extra"} and set(saved["all"]) == {"state", "param_groups", "settings"}
    assert saved["all"]["param_groups"][0]["lr"] == 0.25
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


def test_a_failed_load_leaves_no_hooks_and_no_state() -> None:
    optimizer = UnlearnOptimizer(network().parameters(), rule="adam", lr=0.1)
    with pytest.raises(InputError):
        optimizer.load_state_dict({"state": {0: {"what": 1}}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks
    assert not optimizer.state


def test_a_state_goes_through_files() -> None:
    """NumPy numbers as settings among them: reading with weights_only=True knows none."""
    numbers = {"lr": np.float32(0.125), "weight_decay": np.float64(0.5), "slow_rate": np.float64(0.5)}
    numbers |= {"slow_freq": np.int64(2), "max_norm": np.float32(1.0), "betas": np.array([0.5, 0.75])}
    model = network()
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="adamw", **numbers)
    backward(model, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))  # lists where tuples were
    twin = copy.deepcopy(model)
    other = UnlearnOptimizer(twin.named_parameters(), rule="adamw", **{**numbers, "lr": 1.0})
    other.load_state_dict(saved)
    assert other.param_groups[0]["betas"] == (0.5, 0.75) and other.param_groups[0]["lr"] == 0.125
    for one, step in ((model, optimizer), (twin, other)):
        step.zero_grad()
        backward(one, 1)
        step.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_of_torchs_own_optimizer_goes_on_here() -> None:
    (_, ours), (theirs, optimizer) = pair("adamw")
    for t in range(3):
        optimizer.zero_grad()
        backward(theirs, t)
        optimizer.step()
    model = copy.deepcopy(theirs)
    ours = UnlearnOptimizer(model.parameters(), rule="adamw", lr=1.0)
    ours.load_state_dict(optimizer.state_dict())
    assert [state["step"] for state in ours.state.values()] == [3] * 4
    for one, step in ((model, ours), (theirs, optimizer)):
        step.zero_grad()
        backward(one, 9)
        step.step()
    assert_alike(model, theirs)


def test_text_of_an_optimizer_is_torchs() -> None:
    text = repr(UnlearnOptimizer(network().parameters(), rule="momentum", lr=0.1, momentum=0.9))
    assert text.startswith("UnlearnOptimizer (\nParameter Group 0\n") and "momentum: 0.9" in text
    assert "betas" not in text


# --- Wrappers -------------------------------------------------------------------------------------------------


def test_accelerates_wrapper() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    models = []
    for model, optimizer in pair("adam"):
        prepared, wrapped = accelerator.prepare(model, optimizer)
        scheduler = accelerator.prepare(schedulers.LinearLR(optimizer, 0.5, total_iters=3))
        for t in range(4):
            wrapped.zero_grad()
            backward(prepared, t)
            wrapped.step()
            scheduler.step()
            assert not wrapped.step_was_skipped
        wrapped.load_state_dict(wrapped.state_dict())
        models.append(model)
    assert_alike(*models)


@pytest.mark.parametrize("flat", (False, True), ids=("nested", "flat"))
def test_the_state_by_names_that_checkpoints_take(flat: bool) -> None:
    from torch.distributed.checkpoint import state_dict as by_names

    options = by_names.StateDictOptions(flatten_optimizer_state_dict=flat)
    (model, optimizer), _ = pair("adam")
    backward(model, 0)
    optimizer.step()
    saved = by_names.get_optimizer_state_dict(model, optimizer, options=options)
    twin = copy.deepcopy(model)
    other = UnlearnOptimizer(twin.parameters(), rule="adam", lr=1.0)
    by_names.set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.param_groups[0]["lr"] == 0.05 and other.param_groups[0]["betas"] == (0.9, 0.99)
    for p, q in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert p["step"] == q["step"] == 1 and torch.equal(p["exp_avg"], q["exp_avg"])


def test_an_optimizer_for_each_parameter_in_the_backward_pass() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    models = []
    for kind, rule in ((UnlearnOptimizer, {"rule": "adam"}), (torch.optim.Adam, {})):
        model = network()
        _apply_optimizer_in_backward(kind, model.parameters(), {"lr": 0.1, **rule})
        for t in range(2):
            backward(model, t)
        assert all(p.grad is None for p in model.parameters())
        models.append(model)
    assert_alike(*models)


class Lookahead(torch.optim.Optimizer):
    """As libraries write it: it shares groups and state with the optimizer that it wraps."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.count = optimizer, 0
        self.defaults, self.param_groups, self.state = optimizer.defaults, optimizer.param_groups, optimizer.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            parameters = (p for group in self.param_groups for p in group["params"])
            for slow, p in zip(self.slow, parameters, strict=True):
                slow += 0.5 * (p.detach() - slow)
                p.data.copy_(slow)
        return loss


@pytest.mark.parametrize("rule", OTHERS)
def test_lookahead_and_averages_around_it(rule: str) -> None:
    models = []
    for model, optimizer in pair(rule):
        wrapper = Lookahead(optimizer)
        scheduler = schedulers.OneCycleLR(wrapper, max_lr=0.1, total_steps=8)
        average = torch.optim.swa_utils.AveragedModel(model)
        for t in range(6):
            wrapper.zero_grad()
            backward(model, t)
            wrapper.step()
            scheduler.step()
            average.update_parameters(model)
        models.append(average)
    assert_alike(*models)


def test_zero_redundancy_is_refused_in_one_sentence() -> None:
    """It hands every argument on to the groups, and each rank would clip by the norm of its own part alone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(
            InputError, match="ZeroRedundancyOptimizer, are not supported: shard the model with fully_sh"
        ):
            ZeroRedundancyOptimizer(network().parameters(), UnlearnOptimizer, lr=0.1, rule="adam")
    finally:
        torch.distributed.destroy_process_group()
