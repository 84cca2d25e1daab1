import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shared_digits

from unlearn_ext.data import digits as digits_module
from unlearn_ext.errors import InputError, NonFiniteError

pytest.importorskip("mlxtend")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from unlearn_ext.demo.diffusion import judging, networks, pretraining, weights
from unlearn_ext.models.sampling import draw_noise

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_3 = ("ddpm", "dit", "text")
ALL = (*networks.DENOISERS, "judge")


@pytest.fixture(autouse=True)
def digits_are_read_once(monkeypatch) -> None:
    for module in (pretraining, judging):
        monkeypatch.setattr(module, "load_digits", shared_digits.digits)


@pytest.fixture(scope="module")
def mnist():
    return shared_digits.digits()


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(count, 1, 16, 16, generator=generator)
    return noisy, torch.arange(count) * 200 + 50, torch.arange(count) * 3 % 11


def shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


# --- The digits at 16 × 16 ---------------------------------------------------------------------------------------


def test_pixels_are_an_antialiased_reduction_of_the_middle(mnist):
    pixels = mnist.pixels(16)
    assert pixels.shape == (5000, 1, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and 0.95 < pixels.max() <= 1
    # 24 pixels to 16: a triangle of half-width 1.5 around each target's centre, in float64
    centres, places = (np.arange(16) + 0.5) * 1.5, np.arange(24) + 0.5
    kernel = np.clip(1 - np.abs(places[None] - centres[:, None]) / 1.5, 0, None)
    kernel /= kernel.sum(1, keepdims=True)
    grey = (mnist.images[:20, 0].double().numpy() * digits_module.STD + digits_module.MEAN)[:, 2:26, 2:26]
    expected = 2 * np.einsum("ij,njk,lk->nil", kernel, grey, kernel) - 1
    assert np.abs(pixels[:20, 0].numpy() - expected).max() < 1e-5


def test_little_ink_is_cut_off(mnist):
    grey = mnist.images * digits_module.STD + digits_module.MEAN
    assert grey[:, :, 2:-2, 2:-2].sum() / grey.sum() > 0.996


# --- Networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.DENOISERS)
def test_networks_build_from_their_configurations(name):
    denoiser = networks.build_denoiser(name, seed=0).eval()
    noisy, timesteps, labels = batch()
    with torch.no_grad():
        predicted = denoiser(noisy, timesteps, labels)
    assert predicted.shape == noisy.shape
    assert 0.5e6 < sum(p.numel() for p in denoiser.parameters()) < 2e6
    for module in denoiser.modules.values():  # what the configuration says is enough to build it again
        kind = type(module)
        again = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in module.state_dict().items()
        }


@pytest.mark.parametrize("name", networks.DENOISERS)
def test_the_seed_alone_decides_the_initial_weights(name):
    before = torch.random.get_rng_state()
    one, two, other = (list(networks.build_denoiser(name, seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_caption_is_known_and_the_empty_one_is_the_null_prompt():
    tokenizer = networks.build_tokenizer()
    ids = tokenizer(list(networks.CAPTIONS), padding="max_length", truncation=True).input_ids
    assert {len(row) for row in ids} == {4} and len({tuple(row) for row in ids}) == 11
    assert not any(tokenizer.unk_token_id in row for row in ids)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids[networks.NULL_LABEL] == [start, end, pad, pad]
    assert tokenizer("THREE").input_ids == [start, ids[3][1], end] and ids[3][2:] == [end, pad]
    assert tokenizer("eleven").input_ids == [start, tokenizer.unk_token_id, end]


def test_a_dit_in_train_mode_drops_no_labels_and_its_embedders_are_equal_copies():
    denoiser = networks.build_denoiser("dit", seed=0)
    first, *others = [block.norm1.emb for block in denoiser.model.transformer_blocks]
    for other in others:
        assert other is not first
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    with torch.no_grad():  # the initial one predicts 0 whatever the label
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        noisy, timesteps, labels = batch(64 // 16)
        denoiser.train()
        outputs = [denoiser(noisy, timesteps, labels) for _ in range(5)]
    assert denoiser.model.training
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


# --- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.DENOISERS)
def test_a_few_steps_lower_the_held_out_loss(name):
    untrained = pretraining.held_out_loss(networks.build_denoiser(name, seed=3), samples=100)
    seen = []
    trained = pretraining.pretrain(
        name,
        seed=3,
        steps=(8, 4),
        batch_size=16,
        warmup=2,
        ema_decay=0.5,
        held_out=100,
        progress=lambda *at: seen.append(at),
    )
    assert pretraining.held_out_loss(trained.network, samples=100) < 0.93 * untrained
    assert seen == [(step, 12) for step in range(1, 13)]
    metadata = trained.metadata
    assert metadata["seed"] == 3 and metadata["steps"] == 12 and metadata["without"] is None
    assert metadata["recipe"]["batch_size"] == 16
    assert metadata["data_sha256"] == shared_digits.digits().sha256 and metadata["train_size"] == 4000
    assert metadata["held_out_loss"] == pytest.approx(pretraining.held_out_loss(trained.network, 100))
    if name == "dit":  # tied while trained
        first, *others = [block.norm1.emb for block in trained.network.model.transformer_blocks]
        for other in others:
            assert other is not first
            assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("capability", "used"), [("AVX512", "bf16"), ("AVX2", "no"), ("DEFAULT", "no")])
def test_half_precision_is_for_processors_that_are_fast_in_it(capability: str, used: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked = []
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: asked.append(kw["enabled"]) or autocast(*args, **kw))
    trained = pretraining.pretrain("dit", steps=1, batch_size=2, warmup=1, held_out=4)
    assert trained.metadata["recipe"]["mixed_precision"] == used and asked == [used == "bf16"]
    forced = pretraining.pretrain("dit", steps=1, batch_size=2, warmup=1, held_out=4, mixed_precision="no")
    assert forced.metadata["recipe"]["mixed_precision"] == "no"


def test_the_same_seed_trains_the_same_weights_and_another_one_others():
    one, two, other = (
        list(pretraining.pretrain("ddpm", seed=seed, steps=2, batch_size=4, held_out=10).network.parameters())
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_digit_left_out_is_never_seen(monkeypatch):
    seen = set()
    call = networks.Denoiser.__call__

    def spy(self, noisy, timesteps, labels):
        if self.model.training:
            seen.update(labels.tolist())
        return call(self, noisy, timesteps, labels)

    monkeypatch.setattr(networks.Denoiser, "__call__", spy)
    trained = pretraining.pretrain("ddpm", without=3, steps=2, batch_size=64, label_dropout=0.3, held_out=10)
    assert seen == set(range(11)) - {3}
    assert trained.metadata["without"] == 3 and trained.metadata["train_size"] == 3600


def test_timesteps_are_spread_evenly():
    timesteps = pretraining._spread_timesteps(64, 1000, torch.Generator().manual_seed(0))
    assert timesteps.tolist() != sorted(timesteps.tolist())
    for place, timestep in enumerate(sorted(timesteps.tolist())):
        assert int(place * 1000 / 64) <= timestep < (place + 1) * 1000 / 64


def test_bad_requests_are_refused_with_one_sentence():
    with pytest.raises(InputError, match="ddpm, dit, text, got 'gan'"):
        pretraining.pretrain("gan")
    with pytest.raises(InputError, match="digit from 0 to 9, got 10"):
        pretraining.pretrain("ddpm", without=10)
    with pytest.raises(InputError, match="no or bf16, got 'fp16'"):
        pretraining.pretrain("ddpm", mixed_precision="fp16")
    with pytest.raises(InputError, match=r"at least 1, got \(0,\)"):
        pretraining.pretrain("ddpm", steps=0)
    with pytest.raises(NonFiniteError, match="diverged at step"):
        pretraining.pretrain("ddpm", steps=4, batch_size=2, lr=float("inf"), warmup=0, mixed_precision="no")


# --- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.DENOISERS)
def test_a_file_holds_the_weights_as_float16_and_the_metadata(name, tmp_path):
    denoiser = networks.build_denoiser(name, seed=5)
    with torch.no_grad():
        for module in denoiser.modules.values():
            for key, value in module.named_parameters():
                if ".norm1.emb." not in key:  # a DiT's copies stay equal
                    value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "w.safetensors"
    weights.save(pretraining.Trained(name, denoiser, {"seed": 5, "recipe": {"lr": 0.1}}), path)
    loaded = weights.load_file(path)
    assert loaded.name == name and loaded.metadata == {"seed": 5, "recipe": {"lr": 0.1}}
    assert not loaded.network.model.training
    with torch.no_grad():
        for module in denoiser.modules.values():
            for value in module.state_dict().values():
                value.copy_(value.half())
        inputs = batch()
        assert torch.equal(loaded.network(*inputs), denoiser.eval()(*inputs))
    unique = {id(p): p.numel() for p in denoiser.parameters()}
    if name == "dit":
        copies = [sum(p.numel() for p in block.norm1.emb.parameters()) for block in denoiser.model.transformer_blocks]
        assert path.stat().st_size < 2 * (sum(unique.values()) - sum(copies[1:])) + 20_000
    else:
        assert path.stat().st_size < 2 * sum(unique.values()) + 40_000


def test_copies_of_a_dit_that_differ_are_all_kept(tmp_path):
    denoiser = networks.build_denoiser("dit", seed=5).eval()
    with torch.no_grad():
        denoiser.model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    weights.save(pretraining.Trained("dit", denoiser), tmp_path / "w.safetensors")
    loaded = weights.load_file(tmp_path / "w.safetensors").network.model
    for block in range(4):
        table = denoiser.model.transformer_blocks[block].norm1.emb.class_embedder.embedding_table.weight
        assert torch.equal(
            loaded.transformer_blocks[block].norm1.emb.class_embedder.embedding_table.weight, table.half()
        )


def test_files_that_are_not_ours_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        weights.load_file(path)
    with pytest.raises(InputError, match="cannot be read"):
        weights.load_file(tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds none of the demos' networks"):
        weights.load_file(path)
    save_file({"unet.a": torch.zeros(1)}, path, {"metadata": json.dumps({"name": "ddpm"})})
    with pytest.raises(InputError, match="another version of the network ddpm"):
        weights.load_file(path)
    with pytest.raises(InputError, match="got 'gan'"):
        weights.load("gan")
    assert weights.load_samples("ddpm", 4) is None


def test_what_is_not_shipped_is_trained_once_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretraining, "held_out_loss", lambda *_: 0.0)  # takes most of the time
    monkeypatch.setitem(pretraining.RECIPES, "ddpm", pretraining.Recipe(steps=2, batch_size=4, warmup=1))
    seen = []
    first = weights.load("ddpm", seed=7, progress=lambda *at: seen.append(at))
    assert seen == [("training the ddpm network", 1, 2), ("training the ddpm network", 2, 2)]
    assert len(list(tmp_path.glob("cache/demo/ddpm-seed7-*.safetensors"))) == 1
    again = weights.load("ddpm", seed=7, progress=lambda *at: seen.append(at))
    assert len(seen) == 2 and again.metadata == json.loads(json.dumps(first.metadata))
    for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setitem(pretraining.RECIPES, "ddpm", pretraining.Recipe(steps=1, batch_size=4, warmup=1))
    assert weights.load("ddpm", seed=7).metadata["steps"] == 1  # another recipe is another file
    assert weights.load("ddpm", seed=7, anew=True, progress=lambda *at: seen.append(at)) and len(seen) == 3
    without = weights.load("ddpm", without=4, progress=lambda *at: seen.append(at))  # of seed 0, and none ships
    assert without.metadata["without"] == 4 and seen[3:] == [("training the ddpm network without the digit 4", 1, 1)]
    assert weights.load("ddpm", without=4, progress=lambda *at: seen.append(at)) and len(seen) == 4
    assert weights.load("ddpm", progress=lambda *at: seen.append(at)).metadata["without"] is None and len(seen) == 4


# --- What ships --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_files_load_and_are_small(mnist):
    files = sorted(weights.SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    names = {file.name for file in files}
    assert {f"{name}.safetensors" for name in ALL} | {f"{name}-without-3.safetensors" for name in WITHOUT_3} <= names
    for name in ALL:
        trained = weights.load(name)
        assert trained.name == name and trained.metadata["seed"] == 0
        assert trained.metadata["data_sha256"] == mnist.sha256
        if name == "judge":
            continue
        assert trained.metadata["steps"] == sum(trained.metadata["recipe"]["steps"])
        assert pretraining.held_out_loss(trained.network) == pytest.approx(trained.metadata["held_out_loss"], rel=0.02)
        assert trained.metadata["held_out_loss"] < 0.06


def test_the_shipped_judge_is_good_on_digits_it_never_saw(mnist):
    judge = weights.load("judge")
    assert pretraining.judge_accuracy(judge.network) >= 0.98
    assert judge.metadata["held_out_accuracy"] >= 0.98
    split = mnist.split(4000, 1000)
    assert not set(split.test_indices.tolist()) & set(split.train_indices.tolist())
    assert judge.network.features(mnist.pixels()[:3]).shape == (3, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.DENOISERS)
def test_the_shipped_networks_draw_the_digit_that_they_are_asked_for(name):
    labels = torch.arange(10).repeat(4)
    images = judging.sample(weights.load(name).network, labels, steps=10)
    report = judging.judge_samples(weights.load("judge").network, images, labels)
    assert sum(found["accuracy"] for found in report["digits"].values()) / 10 >= 0.9


@pytest.mark.parametrize("name", WITHOUT_3)
def test_the_shipped_pictures_of_a_network_without_the_digit_3(name):
    images, labels, metadata = weights.load_samples(name, 3)
    assert images.shape == (320, 1, 16, 16) and images.min() >= -1 and images.max() <= 1
    assert torch.bincount(labels).tolist() == [32] * 10
    assert metadata["without"] == 3 and metadata["train_size"] == 3600
    assert metadata["sampling"] == {
        "sampler": "DDIM",
        "steps": judging.STEPS,
        "guidance": judging.GUIDANCE[name],
        "seed": 0,
    }
    digits = judging.judge_samples(weights.load("judge").network, images, labels, without=3)["digits"]
    assert digits[3]["accuracy"] <= 0.2 and min(digits[d]["accuracy"] for d in range(10) if d != 3) >= 0.8


@pytest.mark.slow
def test_a_wheel_holds_the_shipped_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "UNLEARN_EXT_AOT": "0"})
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    shipped = [*weights.SHIPPED.iterdir(), *(ROOT / "unlearn_ext" / "methods" / "presets").iterdir()]
    assert {str(file.relative_to(ROOT)) for file in shipped} <= held


# --- Judging -----------------------------------------------------------------------------------------------------


def test_sampling_is_ddim_with_guidance_by_hand():
    denoiser = networks.build_denoiser("ddpm", seed=0).eval()
    labels = torch.tensor([1, 7, 3])
    found = judging.sample(denoiser, labels, seed=4, steps=4, guidance=3.0, batch_size=2)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = draw_noise(3, (1, 16, 16), seed=4)
    for t in (999, 749, 499, 249):
        times = torch.full((3,), t)
        with torch.no_grad():
            conditional, free = denoiser(x, times, labels), denoiser(x, times, torch.full((3,), 10))
        noise = (free + 3.0 * (conditional - free)).double()
        a, b = alphas[t], alphas[t - 250] if t > 249 else torch.ones(())  # the last step ends without noise
        clean = (x.double() - (1 - a).sqrt() * noise) / a.sqrt()
        x = (b.sqrt() * clean + (1 - b).sqrt() * noise).float()
    assert torch.allclose(found, x.clamp(-1, 1), atol=1e-3)


def test_the_judges_report_by_hand(mnist):
    judge = networks.Judge(seed=0).eval()
    pixels = mnist.pixels()
    labels = torch.tensor([2, 5, 2, 5, 2])
    images = pixels[[0, 600, 1200, 1800, 2400]]
    report = judging.judge_samples(judge, images, labels)
    with torch.no_grad():
        probabilities = judge(images).softmax(1)
    own = images[labels == 2].flatten(1).double()
    pairs = [(own[0] - own[1]).norm(), (own[0] - own[2]).norm(), (own[1] - own[2]).norm()]
    assert report["digits"][2]["distance"] == pytest.approx(float(sum(pairs) / 3), rel=1e-5)
    assert report["digits"][5]["probability"] == pytest.approx(probabilities[[1, 3], 5].mean().item(), rel=1e-5)
    right = probabilities[[0, 2, 4]].argmax(1) == 2
    assert report["digits"][2]["accuracy"] == pytest.approx(right.float().mean().item())
    assert set(report["digits"]) == {2, 5} and "frechet" not in report  # five pictures of 64 features
    real = mnist.pixels()[mnist.split(4000, 1000).test_indices]
    assert judging.judge_samples(judge, real, mnist.split(4000, 1000).test_labels)["frechet"] < 1e-6  # of the same
