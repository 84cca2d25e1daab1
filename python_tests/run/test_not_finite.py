"""Losses, gradients and Fisher sums that are not finite, and what a run leaves then."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import identical, method, run, weights
from torch.utils.checkpoint import checkpoint

from unlearn_ext import InputError, NonFiniteError, Unlearner, UnlearnOptimizer
from unlearn_ext.methods import SSD, NegativeGradientPlus
from unlearn_ext.methods.values import ForgetLoss
from unlearn_ext.run.passes import Passes
from unlearn_ext.tasks import Classification


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_loss_that_is_not_finite_stops_before_its_step(side, monkeypatch) -> None:
    model = make()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    states: list[dict] = []
    forgot: list[dict] = []
    step = UnlearnOptimizer.forget_step

    def recorded(optimizer, *arguments):
        step(optimizer, *arguments)
        forgot.append(weights(model))

    monkeypatch.setattr(UnlearnOptimizer, "forget_step", recorded)

    def poison(m, step):
        states.append(weights(m))
        if step == 2:
            data[side][0 if side == "forget" else 2][0][0] = float("nan")
            data[side][1][0][0] = float("nan")

    with pytest.raises(NonFiniteError, match=rf"iteration 2: the {side} loss is nan"):
        run(model, data, evaluate=poison, evaluate_every=1)
    after = weights(model)
    # Buffers too: the poisoned batch went through BatchNorm.
    assert identical(after, states[-1] if side == "forget" else forgot[-1])


def test_a_term_that_is_not_finite_is_told_from_the_loss_that_it_is_made_of() -> None:
    class Overflowing(NegativeGradientPlus):
        def forget_loss(self, losses, t):
            return ForgetLoss(losses.mean() * float("inf"))

    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    with pytest.raises(NonFiniteError, match=r"iteration 0: the forget term is inf and the step was not made"):
        Unlearner(make(), Classification(), Overflowing(iterations=2)).run(**data)


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    class Root(torch.autograd.Function):
        """A finite loss with an infinite gradient, as sqrt has at 0."""

        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    class Steep(ConvNet):
        steep = False

        def forward(self, x):
            y = super().forward(x)
            return Root.apply(y) if self.steep and self.training else y

    model = make(Steep)

    def switch(m, step):
        m.steep = step == 3

    with pytest.raises(NonFiniteError, match=r"iteration 3: retain_step: the retain gradient of \w+.* is not finite"):
        run(model, evaluate=switch, evaluate_every=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_buffers_that_are_written_are_put_back_and_tables_not_copied_in_every_step(monkeypatch) -> None:
    class WithTable(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += 1
            return super().forward(x)

    model, copied = make(WithTable), []
    remember = Passes.remember_buffers

    def recorded(passes):
        remember(passes)
        copied.append({tuple(before.shape) for *_, before in passes.before})

    monkeypatch.setattr(Passes, "remember_buffers", recorded)
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}

    def poison(m, step):
        if step == 3:
            data["retain"][3][0][0] = float("nan")

    with pytest.raises(NonFiniteError, match="iteration 3"):
        run(model, data, evaluate=poison, evaluate_every=1)
    looked = 2  # before the first step, and in it
    assert (1000,) in copied[0] and not any((1000,) in shapes for shapes in copied[looked:])
    assert model.seen == model.norm.num_batches_tracked == 3 + 2 and model.norm.running_mean.isfinite().all()


def test_buffers_that_a_module_replaces_are_put_back() -> None:
    """A running mean as ``self.mean = 0.9 * self.mean + ...``: a new tensor in every pass."""

    class Centered(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2, 1, 1))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))[:, None, None]
            return super().forward(x - self.mean)

    model = make(Centered)
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    before: list[torch.Tensor] = []

    def poison(m, step):
        before.append(m.mean)
        if step == 3:  # an iteration without a forget step
            data["retain"][3][0][0] = float("nan")

    with pytest.raises(NonFiniteError, match="iteration 3"):
        run(model, data, evaluate=poison, evaluate_every=1)
    assert torch.equal(model.mean, before[-1]) and model.mean.abs().sum() > 0


def test_gradients_found_late_name_their_iterations_and_are_not_saved(monkeypatch, tmp_path) -> None:
    """As on a device, where the host reads the flag at log points and checkpoints only."""

    def late(optimizer):
        if optimizer.param_groups[0]["retain_steps"] > 5:
            raise NonFiniteError("a gradient was not finite")

    monkeypatch.setattr(UnlearnOptimizer, "raise_if_non_finite", late)
    with pytest.raises(NonFiniteError, match=r"^iterations 4 to 5: a gradient was not finite$"):
        run(make(), log_every=4, output_dir=tmp_path, checkpointing_steps=6)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(NonFiniteError, match=r"^iteration 5: a gradient"):
        run(make())


def test_a_non_finite_fisher_pass_changes_nothing() -> None:
    model = make()
    forget = batches(3, 6, seed=1)
    forget[2][0][0] = float("inf")
    with pytest.raises(NonFiniteError, match="batch 2 of the forget set"):
        run(model, {"forget": forget, "retain": batches(5, 6, seed=2)})
    assert identical(weights(model), weights(make()))


def test_models_without_trainable_weights_or_gradients() -> None:
    with pytest.raises(InputError, match="no trainable weights"):
        Unlearner(make().requires_grad_(False), Classification(), method())

    class Detached(ConvNet):
        def forward(self, x):
            return super().forward(x).detach().requires_grad_()

    class Blind(ConvNet):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    class Reentrant(ConvNet):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    words = "the forget loss does not depend on the trained weights: .* use_reentrant=False"
    for kind in (Detached, Blind, Reentrant):
        model = make(kind)
        for changes in ({}, {"gamma": None}):
            with pytest.raises(InputError, match=words):
                run(model, changes=changes)
        sets = batches(3, 6, seed=1), batches(5, 6, seed=2)
        for per_sample in (False, True) if kind is Blind else (False,):  # torch.func refuses the others itself
            with pytest.raises(InputError, match=words):
                SSD(per_sample=per_sample).run(model, Classification(), *sets)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make().parameters(), strict=True))
