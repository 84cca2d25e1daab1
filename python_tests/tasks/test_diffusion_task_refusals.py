"""Batches, classes, prompts, schedulers and arguments that diffusion tasks refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from helpers import denoisers
from helpers.denoisers import CLASSES, images, labels, normal
from helpers.diffusion_tasks import CPU, Denoiser, begun, class_task, prompt_batch, text_task
from helpers.models import make
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification, Task


def refuse(match: str, task: Task, model: nn.Module, batch) -> None:
    with pytest.raises(InputError, match=match):
        task.begin(model, batch)
        task.prepare(batch, CPU)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((images(3), torch.tensor([0, 1, 7])), "label 7 is outside the model's 4 classes"),
        ((images(3), torch.tensor([0, -1, 1])), "label -1 is outside the model's 4 classes"),
        ((images(3), torch.tensor([0, 4, 1])), "label 4 is the null label of the model's 5 label embeddings"),
        ((images(3), torch.tensor([0, 1])), "3 inputs and 2 labels"),
        ((images(3), torch.tensor([0.0, 1.0, 2.0])), "labels: expected integers"),
        ((images(3)[..., :7], labels(3)), "images are 8×7 and the model takes 8×8: resize"),
        ((images(3, channels=3), labels(3)), "images have 3 channels and the model takes 1"),
        ((images(3)[0], labels(1)), r"images: expected shape \[N, channels, height, width\]"),
        ((images(0), labels(0)), "a batch is empty"),
        (((images(3) + 1) * 127.5, labels(3)), r"image values go from 0 to 255: scale images to \[-1, 1\]"),
        (
            (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), labels(3)),
            r"convert them to floating-point numbers and scale them to \[-1, 1\]",
        ),
        ({"pixel_values": images(3)}, "a batch has no labels"),
        ({"labels": labels(3)}, "a batch is .* with one of pixel_values, latents, latent_mean and latent_std"),
        ({"labels": labels(3), "latent_mean": images(3)}, "a batch is .* got a dict of labels, latent_mean"),
        ({"labels": labels(3), "latents": images(3), "pixel_values": images(3)}, "pixel_values and latents: give one"),
        (
            {"labels": labels(3), "latent_mean": images(3), "latent_std": images(2)},
            r"latent_std has shape \[2, 1, 8, 8\] and latent_mean \[3, 1, 8, 8\]",
        ),
        ({"labels": labels(1), "latents": images(1), "replace_labels": torch.tensor([5])}, "label 5 is outside"),
        (images(3), "a batch is .* got Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_that_do_not_fit(batch, match) -> None:
    refuse(match, class_task(), denoisers.unet(), batch)


def test_classes_that_the_model_does_not_have() -> None:
    good = (images(3), labels(3))
    refuse("is not class-conditional: train one with num_class_embeds", class_task(), denoisers.unet(None), good)
    refuse("is told prompts .* use TextConditionalDiffusion", class_task(), denoisers.text_unet(), good)
    four = denoisers.unet(CLASSES)  # trained without a null label
    last = (images(2), torch.tensor([3, 3]))
    refuse("label 3 is the null label of the model's 4 label embeddings", class_task(), four, last)
    task = class_task(label_dropout=0.0)
    task.begin(four, last)
    assert task.prepare(last, CPU)["dropped_labels"].tolist() == [3, 3]
    refuse("label 4 is outside the model's 4 classes", task, four, (images(1), torch.tensor([4])))
    refuse("the null label is 5 and the model has 5", class_task(null_label=5), denoisers.unet(), good)
    refuse("the null label is 0 and the model has 1 label embeddings", class_task(), denoisers.unet(1), good)
    refuse("replace_label 5 is outside the model's 5", class_task(replace_label=5), denoisers.unet(), good)
    refuse("need a null label: give one", class_task(), Denoiser(), good)
    dit = denoisers.dit()
    for dropout in (0.0, 0.1):
        task = class_task(label_dropout=dropout)
        refuse("label 4 is the null label", task, dit, (normal(1, 2, 4, 4), torch.tensor([4])))
    with pytest.raises(InputError, match="the null label is not known yet: call begin"):
        class_task().prepare(good, CPU)


def test_prompts_that_do_not_fit(tmp_path) -> None:
    model, latents = denoisers.text_unet(), normal(3, 2, 8, 8)
    task = text_task(prompt_dropout=0.0)
    refuse("a batch has no prompts", task, model, {"latents": latents})
    refuse("prompts need text_encoder and tokenizer", task, model, {"latents": latents, "prompts": ["a"] * 3})
    refuse("width 7 and the model takes 8", task, model, {"latents": latents, "prompt_embeds": normal(3, 5, 7)})
    refuse("3 samples and 2 prompts", task, model, {"latents": latents, "prompt_embeds": normal(2, 5, 8)})
    refuse("expected floating-point numbers", task, model, {"latents": latents, "prompt_embeds": normal(3, 8)})
    refuse("prompts and prompt_embeds: give one", task, model, prompt_batch(prompts=["a"] * 3))
    refuse("expected a list of N texts, got str", task, model, {"latents": latents, "prompts": "abc"})
    refuse("replacements without their prompts", task, model, prompt_batch(replace_latents=latents))
    refuse(
        r"replacement has shape \[2, 2, 8, 8\]",
        task,
        model,
        prompt_batch(replace_latents=latents[:2], replace_prompt_embeds=normal(3, 8, 8)),
    )
    refuse("takes no prompts: use ClassConditionalDiffusion", task, denoisers.unet(channels=2), prompt_batch())
    refuse(
        r"the empty prompt has embeddings of shape \[4, 8\] and the batch's prompts \[8, 8\]",
        text_task(null_embeds=normal(4, 8)),
        model,
        prompt_batch(),
    )
    with pytest.raises(InputError, match="need the empty prompt"):
        text_task()
    with pytest.raises(InputError, match="text_encoder and tokenizer belong together"):
        text_task(text_encoder=nn.Linear(1, 1))
    encoder, tokenizer = denoisers.text_encoder(tmp_path)
    narrow = text_task(text_encoder=encoder, tokenizer=tokenizer)
    narrow._width = 6
    with pytest.raises(InputError, match="embeddings have width 8 and the model takes 6"):
        narrow.prepare({"latents": latents, "prompts": ["a"] * 3}, CPU)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"reduction": "max"}, "reduction: expected mean or sum"),
        ({"label_dropout": 1.5}, r"label_dropout: expected a probability in \[0, 1\]"),
        ({"guidance": -1.0}, "guidance: expected a finite number from 0"),
        ({"scaling_factor": 0.0}, "scaling_factor: expected a finite number above 0"),
        ({"null_label": -1}, "null_label: expected an integer from 0"),
        ({"replace_label": "cat"}, "replace_label: expected an integer from 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, match) -> None:
    with pytest.raises(InputError, match=match):
        class_task(**arguments)


def test_schedulers_that_are_none() -> None:
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        ClassConditionalDiffusion(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match="has no alphas_cumprod: pass a diffusers scheduler"):
        ClassConditionalDiffusion(10)
    learned = DDPMScheduler(variance_type="learned")
    with pytest.raises(InputError, match="only 'learned_range'"):
        ClassConditionalDiffusion(learned)
    ClassConditionalDiffusion(learned, variational_bound=False)


def test_outputs_of_the_wrong_shape() -> None:
    batch = (images(2), labels(2))
    for outputs, bound, match in ((3, None, "expected 1 or 2 channels"), (1, True, "expected 2 channels")):
        model = Denoiser(outputs)
        task, prepared = begun(model, batch, label_dropout=0.0, variational_bound=bound)
        with pytest.raises(InputError, match=match):
            task.losses(model, prepared)


def test_replacement_needs_a_task_and_a_batch_that_have_one() -> None:
    class Own(Classification):
        replacement_losses = Task.replacement_losses

    method = SFRon(forget_term="replace", gamma=None, iterations=2)
    with pytest.raises(InputError, match=r"Own has no replacement.*as with forget_term='ascent', or give the task"):
        Unlearner(make(), Own(), method)
    with pytest.raises(InputError, match="Own has no replacement"):
        Own().replacement_losses(make(), None)
    model = denoisers.unet()
    before = copy.deepcopy(model.state_dict())
    data = [(images(2), labels(2))], [(images(2, seed=1), labels(2))]
    with pytest.raises(InputError, match="give the task a replace_label or the batch replace_labels"):
        Unlearner(model, class_task(), method).run(*data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="add replace_prompts"):
        Unlearner(denoisers.text_unet(), text_task(prompt_dropout=0.0), method).run(
            [prompt_batch()], [prompt_batch()], allow_duplicates=True
        )
    with pytest.raises(InputError, match="forget_term: expected ascent or replace"):
        SFRon(forget_term="descent")


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_a_forget_batch_without_a_replacement_is_refused_at_once(monkeypatch, gamma) -> None:
    """Before a Fisher pass that would be for nothing, and before any step."""
    method = SFRon(forget_term="replace", gamma=gamma, iterations=2)
    for task, model, forget, retain in (
        (class_task(), denoisers.unet(), (images(2), labels(2)), (images(2, seed=1), labels(2))),
        (text_task(prompt_dropout=0.0), denoisers.text_unet(), prompt_batch(), prompt_batch()),
    ):
        monkeypatch.setattr(task, "prepare", lambda *arguments: pytest.fail("a batch was used"))
        with pytest.raises(InputError, match="a forget batch has no replacement"):
            Unlearner(model, task, method).run([forget], [retain], allow_duplicates=True)
