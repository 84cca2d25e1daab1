"""Runs on diffusion tasks, the weights that they train, and tied embedders."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from helpers import denoisers
from helpers.denoisers import images, labels, normal
from helpers.diffusion_tasks import CPU, begun, class_task, prompt_batch, text_task
from helpers.models import ConvNet
from torch import Tensor, nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import DOMAINS, SFRon
from unlearn_ext.models.weights import select_trained, tie_embeddings, untie_embeddings
from unlearn_ext.tasks import Task

# --- Runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replacing_moves_the_prediction_towards_the_replacement() -> None:
    model = denoisers.unet()
    forget, retain = [(images(8), torch.full((8,), 2))], [(images(8, seed=1), labels(8) % 2)]
    task = class_task(replace_label=3)
    task.begin(model, forget[0])
    probe = task.prepare(forget[0], CPU)
    before = task.replacement_losses(model, probe).mean().item()
    method = SFRon(rule="adam", lr=1e-3, forget_term="replace", forget_schedule="constant", gamma=None, iterations=30)
    result = Unlearner(model, task, method).run(forget, retain)
    assert task.replacement_losses(model, probe).mean().item() < before / 2
    assert result.history[0]["largest_share"] is None and result.history[0]["alpha"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddpm", "dit", "text"])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, kind) -> None:
    def setting() -> tuple:
        if kind == "text":
            forget = [prompt_batch(replace_prompt_embeds=normal(3, 8, 8, seed=2)) for _ in range(2)]
            retain = [{"latents": normal(3, 2, 8, 8, seed=4 + i), "prompt_embeds": normal(3, 8, 8)} for i in range(3)]
            return denoisers.text_unet(), text_task(null_embeds=normal(8, 8)), "sd-nudity", forget, retain
        preset = {"ddpm": "ddpm-cifar10", "dit": "dit-xl-2-256"}[kind]
        model, shape = (denoisers.unet(dropout=0.1), (1, 8, 8)) if kind == "ddpm" else (denoisers.dit(), (2, 4, 4))

        def batch(seed: int) -> dict[str, Tensor]:
            return {
                "latent_mean": normal(4, *shape, seed=seed),
                "latent_std": torch.ones(4, *shape),
                "labels": labels(4),
            }

        parts = [batch(i) for i in range(2)], [batch(10 + i) for i in range(3)]
        return model, class_task(**DOMAINS[preset]["task"]), preset, *parts

    def go(iterations_seen: list, **arguments) -> tuple[nn.Module, Task]:
        model, task, preset, forget, retain = setting()
        torch.manual_seed(5)
        method = SFRon.preset(preset, iterations=6)
        result = Unlearner(model, task, method).run(forget, retain, **arguments)
        iterations_seen.extend(result.history)
        return model, task

    whole, parts = [], []
    expected, task = go(whole, output_dir=tmp_path / "whole", checkpointing_steps=100)
    go([], output_dir=tmp_path / "parts", checkpointing_steps=2)
    for number in (6, 4):  # as if it had stopped after the second iteration
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{number}")
    torch.manual_seed(77)
    got, other = go(parts, output_dir=tmp_path / "parts", resume_from_checkpoint="latest")
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True))
    assert torch.equal(task.generator.get_state(), other.generator.get_state())
    assert whole == parts and len(whole) == 6


def test_looking_at_the_task_in_an_evaluation_does_not_change_the_run() -> None:
    paths = []
    for look in (False, True):
        model, task = denoisers.unet(), class_task()
        forget, retain = [(images(4), labels(4))], [(images(4, seed=1), labels(4))]

        def evaluate(model, iteration, task=task, batch=forget[0], look=look):
            if look:
                task.losses(model, task.prepare(batch, CPU))

        method = SFRon.preset("ddpm-cifar10", iterations=3)
        Unlearner(model, task, method).run(forget, retain, evaluate=evaluate, evaluate_every=1)
        paths.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_has_a_preset_a_task_and_a_source(name) -> None:
    domain = DOMAINS[name]
    assert set(domain) == {"task", "run", "published"} and "arXiv" in domain["published"]["source"]
    assert SFRon.preset(name).name == "sfron" and domain["run"]["train_batch_size"] >= 1
    select_trained({"sd-nudity": denoisers.text_unet}.get(name, denoisers.unet)(), domain["run"]["trained_weights"])


# --- Trained weights ------------------------------------------------------------------------------------------


def test_select_trained() -> None:
    model = denoisers.text_unet()
    everything = [name for name, _ in model.named_parameters()]
    assert select_trained(model) == everything
    attention = select_trained(model, "attention")
    assert attention == [name for name in everything if ".attn1." in name or ".attn2." in name or "mid_attn" in name]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == attention
    cross = select_trained(model, "cross-attention")
    assert cross == [name for name in everything if ".attn2." in name] and cross
    assert select_trained(model, r"attn2\.to_[kv]") == [n for n in everything if "attn2.to_k" in n or "attn2.to_v" in n]
    assert select_trained(model, "all") == everything and all(p.requires_grad for p in model.parameters())
    assert select_trained(denoisers.dit(), "attention")[0].startswith("transformer_blocks.0.attn1.")
    for which, match in (("nowhere", "the model has none for 'nowhere'"), ("(", "or a regular expression, got")):
        select_trained(model, "cross-attention")
        with pytest.raises(InputError, match=match):
            select_trained(model, which)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == cross
    with pytest.raises(InputError, match="the model has none for 'cross-attention'"):
        select_trained(denoisers.dit(), "cross-attention")


def test_embedders_are_tied_and_untied(tmp_path) -> None:
    model, copies = denoisers.dit(layers=3), denoisers.dit(layers=3)
    one = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert tie_embeddings(copy.deepcopy(model).to("meta")) == 2 * one, "where there are no numbers to compare"
    assert tie_embeddings(model) == 2 * one and tie_embeddings(model) == 0
    assert sum(p.numel() for p in model.parameters()) == total - 2 * one

    batch = (normal(4, 2, 4, 4).float(), labels(4))
    task, prepared = begun(model, batch)
    for network in (model, copies):
        task.losses(network, prepared).mean().backward()
    named = dict(copies.named_parameters())
    for name, p in model.transformer_blocks[0].norm1.emb.named_parameters():
        parts = [named[f"transformer_blocks.{i}.norm1.emb.{name}"].grad for i in range(3)]
        assert torch.allclose(p.grad, sum(parts), rtol=1e-4, atol=1e-7) and (parts[1] != 0).any()

    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.transformer_blocks[0].norm1.emb.requires_grad_(False)
    before = model(prepared["inputs"], prepared["timesteps"], prepared["labels"]).sample
    assert untie_embeddings(model) == 2 * one and untie_embeddings(model) == 0
    assert sum(p.numel() for p in model.parameters()) == total
    states = [block.norm1.emb.state_dict() for block in model.transformer_blocks]
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in state)
    assert not any(p.requires_grad for block in model.transformer_blocks for p in block.norm1.emb.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(prepared["inputs"], prepared["timesteps"], prepared["labels"]).sample, before)


def test_embedders_that_differ_are_not_tied() -> None:
    model = denoisers.dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1e-6
    with pytest.raises(InputError, match=r"embedding_table\.weight of block 1 is not that of block 0"):
        tie_embeddings(model)
    assert untie_embeddings(model) == 0, "nothing was tied"
    for other in (denoisers.unet(), ConvNet()):
        with pytest.raises(InputError, match="has no embedders in its blocks"):
            tie_embeddings(other)
