"""Diffusion tasks: what is drawn, what the losses are, prompts."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers import denoisers
from helpers.denoisers import CLASSES, images, labels, normal, scheduler
from helpers.diffusion_oracle import Diffusion, Draws
from helpers.diffusion_tasks import CPU, Denoiser, begun, class_task, prompt_batch, text_task
from helpers.models import make
from torch import Tensor, nn

from unlearn_ext import FisherDiagonal, InputError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.models.weights import tie_embeddings
from unlearn_ext.tasks import Classification
from unlearn_ext.tasks._variational import variational_bound

# --- Draws ----------------------------------------------------------------------------------------------------


def test_everything_random_is_drawn_once_in_the_documented_order() -> None:
    mean, std = normal(5, 2, 4, 4), normal(5, 2, 4, 4, seed=1).abs()
    batch = {"latent_mean": mean, "latent_std": std, "labels": labels(5)}
    model = denoisers.dit().double().train()
    everywhere = torch.get_rng_state()
    task, prepared = begun(model, batch, label_dropout=0.5, scaling_factor=0.7, seed=3)

    draws = Draws(3, 10)
    x = 0.7 * (mean + std * draws.normal(mean))
    t, noise = draws.timesteps(5), draws.normal(mean)
    dropped = [CLASSES if drop else int(label) for drop, label in zip(draws.dropped(5, 0.5), labels(5), strict=True)]
    assert (prepared["inputs"] - x).abs().max() < 1e-15
    assert torch.equal(prepared["timesteps"], t) and torch.equal(prepared["noise"], noise)
    assert prepared["dropped_labels"].tolist() == dropped and torch.equal(prepared["labels"], batch["labels"])
    assert 0 < dropped.count(CLASSES) < 5

    state = task.generator.get_state()
    first = task.losses(model, prepared)
    assert torch.equal(first, task.losses(copy.deepcopy(model), prepared)), "teacher and student see the same draw"
    assert torch.equal(task.generator.get_state(), state) and torch.equal(torch.get_rng_state(), everywhere)
    assert task.generators() == [task.generator]
    again = task.prepare(batch, CPU)
    assert not torch.equal(again["noise"], prepared["noise"])


def test_the_draws_do_not_depend_on_the_precision() -> None:
    batch = (images(4), labels(4))
    _, wide = begun(denoisers.unet().double(), batch)
    _, narrow = begun(denoisers.unet().bfloat16(), batch)
    assert wide["noise"].dtype == torch.float64 and narrow["noise"].dtype == torch.float32
    assert torch.equal(wide["noise"].float(), narrow["noise"])
    assert torch.equal(wide["timesteps"], narrow["timesteps"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_of_a_dit_sees_the_label_that_was_drawn(checkpointing) -> None:
    model = denoisers.dit(layers=4).train()
    if checkpointing:  # the blocks run again in the backward pass
        model.enable_gradient_checkpointing()
    seen: list[Tensor] = []
    for block in model.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table
        table.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    batch = (normal(64, 2, 4, 4).float(), labels(64))
    task, prepared = begun(model, batch, label_dropout=0.5)
    for _ in range(2):  # a loop may switch the whole model to train mode in between
        model.train()
        task.losses(model, prepared).mean().backward()
    assert len(seen) == 2 * (5 + checkpointing * 4)  # the output layer asks the first embedder again
    assert all(torch.equal(told, prepared["dropped_labels"]) for told in seen)
    assert 16 < (prepared["dropped_labels"] == CLASSES).sum() < 48


def test_modes_are_as_before_after_a_run() -> None:
    model = denoisers.dit().train()
    batch = [(normal(4, 2, 4, 4).float(), labels(4))], [(normal(4, 2, 4, 4, seed=1).float(), labels(4))]
    Unlearner(model, class_task(), SFRon.preset("dit-xl-2-256", iterations=1)).run(*batch)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_antithetic_timesteps(count) -> None:
    batch = (images(count), labels(count))
    _, prepared = begun(denoisers.unet(), batch, antithetic=True)
    t = prepared["timesteps"].tolist()
    assert len(t) == count and all(0 <= k < 10 for k in t)
    half = count // 2 + 1
    assert all(t[half + i] == 9 - t[i] for i in range(count - half))


def test_timesteps_are_uniform() -> None:
    task = class_task()
    for antithetic in (False, True):
        t = task.schedule.draw(10_000, task.generator, antithetic)
        assert ((torch.bincount(t, minlength=10) - 1000).abs() < 150).all()


def test_labels_are_dropped_as_often_as_asked() -> None:
    batch = (torch.zeros(10_000, 1, 8, 8), labels(10_000))
    _, prepared = begun(denoisers.unet(), batch, label_dropout=0.2)
    assert abs((prepared["dropped_labels"] == CLASSES).float().mean() - 0.2) < 0.02
    _, prepared = begun(denoisers.unet(), batch, label_dropout=0.0)
    assert torch.equal(prepared["dropped_labels"], batch[1])


# --- Losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_the_model_predicts(kind, reduction) -> None:
    model = Denoiser()
    batch = (images(6), labels(6))
    task, prepared = begun(model, batch, prediction_type=kind, reduction=reduction, label_dropout=0.3, null_label=9)
    losses = task.losses(model, prepared)
    left = torch.cumprod(1 - scheduler().betas.double(), 0)
    for i, k in enumerate(prepared["timesteps"].tolist()):
        total = 0.0
        signal, spread = math.sqrt(left[k]), math.sqrt(1 - left[k])
        for x, n in zip(batch[0][i].flatten().tolist(), prepared["noise"][i].flatten().tolist(), strict=True):
            told = prepared["dropped_labels"][i].item()
            prediction = 0.3 * (signal * x + spread * n) + 0.1 * told + 0.01 * k
            target = {"epsilon": n, "sample": x, "v_prediction": signal * n - spread * x}[kind]
            total += (prediction - target) ** 2 / (64 if reduction == "mean" else 1)
        assert losses[i].item() == pytest.approx(total, rel=1e-12)
    assert losses.dtype == torch.float64 and losses.shape == (6,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusers_agrees_on_noise_and_on_what_a_prediction_implies(kind) -> None:
    own, schedule = scheduler(kind), class_task(prediction_type=kind).schedule
    x, noise, t = images(10), normal(10, 1, 8, 8, seed=1), torch.arange(10)
    noisy = schedule.add(x, noise, t)
    assert (noisy - own.add_noise(x, noise, t)).abs().max() < 1e-5, "diffusers has float32 products"
    target = schedule.target(x, noise, t)
    assert (schedule.sample(target, noisy, t) - x).abs().max() < 1e-12
    if kind == "v_prediction":
        assert (target - own.get_velocity(x, noise, t)).abs().max() < 1e-5


def test_losses_of_half_models_are_float32() -> None:
    model = denoisers.unet().bfloat16()
    task, prepared = begun(model, (images(3), labels(3)))
    assert task.losses(model, prepared).dtype == torch.float32
    model = denoisers.unet()
    with torch.autocast("cpu", torch.bfloat16):
        assert task.losses(model, prepared).dtype == torch.float32


def test_variational_bound() -> None:
    model = denoisers.dit().double().eval()
    batch = (normal(40, 2, 4, 4).clamp(-1.2, 1.2), labels(40))
    task, prepared = begun(model, batch, label_dropout=0.0)
    x, noise, t = prepared["inputs"], prepared["noise"], prepared["timesteps"]
    diffusion = Diffusion(scheduler().betas)
    noisy = diffusion.noisy(x, noise, t)
    assert set(t.tolist()) == set(range(10)) and (x.abs() > 0.999).any()
    output = model(noisy, t, prepared["labels"]).sample
    squares = ((noise - output[:, :2]) ** 2).mean((1, 2, 3))
    bits = torch.stack(
        [diffusion.bound(x[i], noisy[i], output[i, :2], output[i, 2:], k).mean() for i, k in enumerate(t.tolist())]
    )
    assert (task.losses(model, prepared) - squares - bits).abs().max() < 1e-10
    assert bits.min() > 0

    without = class_task(variational_bound=False, label_dropout=0.0)
    assert (without.losses(model, prepared) - squares).abs().max() < 1e-12


def test_the_bound_trains_the_variance_alone() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.variance = nn.Parameter(normal(20, 1, 8, 8)), nn.Parameter(normal(20, 1, 8, 8, seed=1))

        def forward(self, x, t, class_labels):
            return (torch.cat([self.mean, self.variance], 1),)

    model = Split()
    task, prepared = begun(model, (images(20), labels(20)), label_dropout=0.0)
    task.losses(model, prepared).sum().backward()
    target = prepared["noise"]
    assert (model.mean.grad - 2 * (model.mean - target) / 64).abs().max() < 1e-12
    assert (model.variance.grad.abs() > 0).any()


def test_the_bound_is_zero_for_the_true_posterior() -> None:
    """Where the prediction is exact and the variance that of the posterior, t > 0."""
    schedule = class_task().schedule
    x, noise, t = images(9), normal(9, 1, 8, 8), torch.arange(1, 10)
    noisy = schedule.add(x, noise, t)
    assert variational_bound(schedule, noise, -torch.ones_like(x), x, noisy, t).abs().max() < 1e-9
    assert variational_bound(schedule, noise, torch.ones_like(x), x, noisy, t).min() > 1e-3


@pytest.mark.parametrize("model", [denoisers.unet(channels=2), denoisers.dit()], ids=["unet", "dit"])
def test_guidance_of_the_fisher_losses(model) -> None:
    model = copy.deepcopy(model).double().eval()
    size = model.config.sample_size
    batch = (normal(6, 2, size, size), labels(6))
    task, prepared = begun(model, batch, label_dropout=0.9, variational_bound=False)
    noisy = task.schedule.add(prepared["inputs"], prepared["noise"], prepared["timesteps"])
    with_it, without = (
        model(noisy, prepared["timesteps"], told).sample[:, :2]
        for told in (prepared["labels"], torch.full((6,), CLASSES))
    )
    for guidance in (0.0, 1.0, 2.0, None):  # None: no label is dropped either
        task.guidance, s = guidance, 1.0 if guidance is None else guidance
        wanted = ((prepared["noise"] - ((1 - s) * without + s * with_it)) ** 2).mean((1, 2, 3))
        assert (task.fisher_losses(model, prepared) - wanted).abs().max() < 1e-12
    assert (with_it - without).abs().max() > 1e-3


def test_latents_and_pixels() -> None:
    model = denoisers.dit().double()
    values = normal(3, 2, 4, 4)
    for batch, factor in (
        ({"latents": values, "labels": labels(3)}, 0.5),
        ({"latent_mean": values, "latent_std": torch.zeros_like(values), "labels": labels(3)}, 0.5),
        ({"pixel_values": values, "labels": labels(3)}, 1.0),
        ((values, labels(3)), 1.0),
    ):
        task, prepared = begun(model, batch, scaling_factor=0.5)
        assert torch.equal(prepared["inputs"], factor * values)
        assert torch.equal(task.inputs(batch), values) and task.size(prepared) == task.size(batch) == 3


def test_replacement_by_a_label() -> None:
    model = denoisers.unet().double()
    batch = {"pixel_values": images(4), "labels": labels(4)}
    task, prepared = begun(model, batch, replace_label=3, label_dropout=0.9, reduction="sum")
    t = prepared["timesteps"]
    noisy = task.schedule.add(prepared["inputs"], prepared["noise"], t)
    target = model(noisy, t, torch.full((4,), 3)).sample.detach()
    wanted = ((model(noisy, t, batch["labels"]).sample - target) ** 2).sum((1, 2, 3))
    got = task.replacement_losses(model, prepared)
    assert (got - wanted).abs().max() < 1e-12
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(losses.sum(), parameters) for losses in (got, wanted))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    _, other = begun(model, {**batch, "replace_labels": torch.tensor([0, 1, CLASSES, 2])}, replace_label=3)
    assert other["replace_labels"].tolist() == [0, 1, CLASSES, 2]


def test_autocast_does_not_take_the_gradient_of_a_replacement() -> None:
    """It keeps a weight's rounded copy, and one that was made without gradients would stay without."""
    model = denoisers.unet()
    batch = {"pixel_values": images(4), "labels": labels(4)}
    task, prepared = begun(model, batch, replace_label=3)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            task.replacement_losses(model, prepared).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention has no batching rule of its own
def test_a_function_does_for_a_model() -> None:
    """Exact per-sample Fisher diagonals call the task with a function; against one gradient at a time."""
    model = denoisers.dit().double().train()
    tie_embeddings(model)
    batch = (normal(5, 2, 4, 4), labels(5))
    fisher = FisherDiagonal(model, class_task(guidance=2.0), per_sample=True, chunk=2, max_norm=0.5).measure([batch])
    task, prepared = begun(model, batch, guidance=2.0)
    model.eval()
    total, clipped = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    for i in range(5):
        model.zero_grad()
        task.fisher_losses(model, {name: value[i : i + 1] for name, value in prepared.items()}).sum().backward()
        clipped += int(nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5)
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / 5
    assert clipped > 0
    assert all((total[name] - value).abs().max() < 1e-12 for name, value in fisher.means().items())


@pytest.mark.slow
def test_a_compiled_dit_unlearns_as_it_does_uncompiled() -> None:
    """torch.compile(model) is handed over in the model's place, to the Fisher pass and to the iterations."""
    results, fishers = [], []
    data = [[(normal(3, 2, 4, 4, seed=seed), labels(3))] for seed in (1, 2)]
    for compiled in (False, True):
        own = denoisers.dit().double()
        torch.compiler.reset()
        model = torch.compile(own, backend="aot_eager") if compiled else own
        exact = FisherDiagonal(model, class_task(), per_sample=True, chunk=1).measure(data[0])
        fishers.append(exact.means())
        method = SFRon.preset("dit-xl-2-256", iterations=3, forget_alpha=1.0, fisher_batches=1)
        unlearner = Unlearner(model, class_task(label_dropout=0.5), method)
        result = unlearner.run(forget=data[0], retain=data[1])
        results.append((dict(own.named_parameters()), result))
    (plain, one), (moved, other) = results
    assert set(fishers[0]) == set(fishers[1]) == set(plain), "plain names"
    for name, want in fishers[0].items():
        torch.testing.assert_close(fishers[1][name], want, rtol=1e-9, atol=1e-20)
    assert one.mask.kept == other.mask.kept
    for entry, same in zip(one.history, other.history, strict=True):
        assert entry["retain_loss"] == pytest.approx(same["retain_loss"], rel=1e-9)
    assert all((plain[name] - p).abs().max() < 1e-8 for name, p in moved.items())
    start = dict(denoisers.dit().double().named_parameters())
    assert max((plain[name] - p).abs().max() for name, p in start.items()) > 1e-4


@pytest.mark.parametrize("max_norm", [0.0, -1.0, "much"])
def test_fisher_clipping_needs_a_norm(max_norm) -> None:
    with pytest.raises(InputError, match="Fisher max_norm: expected more than 0"):
        FisherDiagonal(make(), Classification(), max_norm=max_norm)
    with pytest.raises(InputError, match="fisher_max_norm: expected more than 0"):
        SFRon(fisher_max_norm=max_norm)


# --- Prompts --------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_by_text(tmp_path) -> None:
    encoder, tokenizer = denoisers.text_encoder(tmp_path)
    calls: list[Tensor] = []
    encoder.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    task = text_task(text_encoder=encoder, tokenizer=tokenizer, prompt_dropout=0.5)
    model = denoisers.text_unet()
    batch = {"latents": normal(4, 2, 8, 8), "prompts": ["one", "two", "one", "three"]}
    task.begin(model, batch)
    first, second = task.prepare(batch, CPU), task.prepare(batch, CPU)
    assert sum(len(ids) for ids in calls) == 4  # three texts and the empty one
    assert torch.equal(first["prompt_embeds"], second["prompt_embeds"])
    assert not torch.equal(first["dropped"], second["dropped"])

    encoder.eval()
    tokens = tokenizer(batch["prompts"] + [""], padding="max_length", max_length=8, return_tensors="pt")
    wanted = encoder(tokens.input_ids)[0].detach()
    assert torch.equal(first["prompt_embeds"], wanted[:4]), "not in train mode, with its dropout"
    noisy = task.schedule.add(first["inputs"], first["noise"], first["timesteps"])
    told = torch.where(first["dropped"][:, None, None], wanted[4:], wanted[:4])
    losses = ((model(noisy, first["timesteps"], told).sample - first["noise"]) ** 2).mean((1, 2, 3))
    assert torch.allclose(task.losses(model, first), losses, rtol=1e-6)
    assert 0 < first["dropped"].sum() < 4

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.prepare({**batch, "prompts": ["one"] * 3 + ["abcdefghijklm"]}, CPU)
    assert ["'abcdefghijklm' is longer than 8 tokens" in str(w.message) for w in caught] == [True]


def test_replacement_by_a_prompt_takes_the_same_samples_unless_told() -> None:
    model = denoisers.text_unet().double()
    replace = normal(3, 8, 8, seed=2)
    task = text_task(prompt_dropout=0.0)
    for more in ({}, {"replace_latents": normal(3, 2, 8, 8, seed=3)}):
        batch = prompt_batch(replace_prompt_embeds=replace, **more)
        task.begin(model, batch)
        prepared = task.prepare(batch, CPU)
        t, noise = prepared["timesteps"], prepared["noise"]
        other = task.schedule.add(more.get("replace_latents", batch["latents"]), noise, t)
        noisy = task.schedule.add(batch["latents"], noise, t)
        wanted = model(noisy, t, batch["prompt_embeds"]).sample - model(other, t, replace).sample
        losses = task.replacement_losses(model, prepared)
        assert (losses - (wanted**2).mean((1, 2, 3))).abs().max() < 1e-12
