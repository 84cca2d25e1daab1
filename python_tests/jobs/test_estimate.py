"""What ``unlearn-ext forget --dry-run`` says of memory and time, held against runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers import forgetting
from helpers.pipelines import (
    NAMES,
    save_classifier,
    save_digit_folders,
    small_dit,
    small_vae,
)

from unlearn_ext.distributed.wrappers import trainable
from unlearn_ext.jobs import pictures as pictures_module
from unlearn_ext.jobs import run as run_module
from unlearn_ext.jobs.dry_run import estimate_run, other_networks
from unlearn_ext.jobs.estimate import Trials, Workload, estimate, sizes_on_disk
from unlearn_ext.jobs.plan import ForgetPlan
from unlearn_ext.jobs.run import ForgetRun
from unlearn_ext.jobs.trial import Trial, try_batch, try_samples
from unlearn_ext.methods import SFRon
from unlearn_ext.models.judge import Judge
from unlearn_ext.run import loop
from unlearn_ext.saliency import FisherDiagonal, SaliencyMask


@pytest.fixture(scope="module")
def home(home: Path) -> Path:
    shutil.rmtree(home / "digits")
    (home / "named").rename(home / "digits")
    save_classifier(home / "judge", hidden_size=64, num_hidden_layers=2, intermediate_size=64, patch_size=4)
    (home / "map.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    return home


def plan_of(home: Path, model: str, output: Path, **options) -> ForgetPlan:
    """One denoising step; the folders carry names."""
    own = {"class_map": home / "map.json"}
    if model == "text":
        own = {"forget_class": None, "forget_prompt": "three", "replace_prompt": "two"}
    return forgetting.plan_of(home, model, output, **{"num_inference_steps": 1, **own, **options})


# --- Memory ---------------------------------------------------------------------------------------------------------


STAGES = {  # stage -> where a run does its work
    "encoding": (run_module, "encode_latents"),
    "Fisher": (FisherDiagonal, "measure"),
    "mask": (SaliencyMask, "from_fisher"),
    "iterations": (loop.Loop, "run"),
    "sampling": (pictures_module.Pictures, "take"),
    "judging": (Judge, "probabilities"),
}


def peaks(plan: ForgetPlan, monkeypatch) -> dict[str, int]:
    """Stage -> the most bytes alive in a run: weights, buffers, and what PyTorch's allocator took and gave back in the
    run, as its profiler saw it. The trials of an estimate know nothing of either."""
    from torch.profiler import ProfilerActivity, profile, record_function

    def marked(stage, function):
        def call(*arguments, **options):
            with record_function(f"stage: {stage}"):
                return function(*arguments, **options)

        return call

    for stage, (owner, name) in STAGES.items():
        monkeypatch.setattr(owner, name, marked(stage, getattr(owner, name)))
    weights = [t for network in (plan.model, *other_networks(plan)) for t in network.state_dict().values()]
    now = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in weights}.values())
    del weights
    trained = [(p, p.data) for p in trainable(plan.model).values()]
    now -= sum(data.untyped_storage().nbytes() for _, data in trained)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for p, data in trained:  # the profiler does not see the end of what was there before it
            p.data = data.clone()
        ForgetRun(plan).run()
    roots = profiled.profiler.kineto_results.experimental_event_tree()
    ranges, moments = [], []
    for event, operator in _walk(roots):
        if event.name.startswith("stage: "):
            ranges.append((event.name[7:], event.start_time_ns, event.start_time_ns + event.duration_time_ns))
        elif event.name == "[memory]":
            moments.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr, operator))
    found: dict[str, int] = {}
    for moment, size in _without_scratch(sorted(moments, key=lambda m: m[0])):
        now += size
        for stage, start, end in ranges:
            if start <= moment <= end:
                found[stage] = max(found.get(stage, 0), now)
    return found


def _walk(events, operator: int | None = None):
    """Every event of the profiler's trees, with the convolution that it happened in, if any."""
    for event in events:
        yield event, operator
        inside = id(event) if operator is None and "convolution" in event.name else operator
        yield from _walk(event.children, inside)


def _without_scratch(moments):
    """What is alive, without what a convolution takes and gives back within itself: copies of its operands in blocks of
    as many channels as the processor's vectors hold, which differ from one processor to the next. An estimate counts
    tensors."""
    taken: dict[int, tuple[int, int]] = {}  # address -> place in the list, and the convolution
    scratch: set[int] = set()
    for place, (_, size, address, operator) in enumerate(moments):
        if size > 0:
            taken[address] = place, operator
        elif address in taken:
            first, where = taken.pop(address)
            if where is not None and where == operator:
                scratch |= {first, place}
    return [(moment, size) for place, (moment, size, *_) in enumerate(moments) if place not in scratch]


def check_memory(plan: ForgetPlan, monkeypatch, tolerance: float) -> None:
    expected = {stage: sum(parts.values()) for stage, parts in estimate_run(plan).memory.items()}
    measured = peaks(plan, monkeypatch)
    assert measured == {  # tables and indices of a run are no part of an estimate
        stage: pytest.approx(size, rel=tolerance, abs=150_000) for stage, size in expected.items()
    }


@pytest.mark.slow
def test_the_memory_of_a_larger_dit_is_what_was_estimated(home: Path, tmp_path: Path, monkeypatch) -> None:
    """24 million weights, batches of 4, in float32: the forward pass keeps about as many bytes as gradients take."""
    from diffusers import DDIMScheduler, DiTPipeline

    model = small_dit(sample_size=16, layers=8, heads=6, head_dim=64)
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 30e6
    DiTPipeline(model, small_vae(), DDIMScheduler(num_train_timesteps=50)).save_pretrained(home / "larger")
    plan = plan_of(home, "larger", tmp_path / "out", tie_embeddings=False, guidance_scale=1.0)
    check_memory(plan, monkeypatch, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("ddpm", {}),
        ("ddpm", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("dit", {"save_weights": "ema", "ema_decay": 0.5, "samples": 4}),
        ("text", {"trained_weights": "cross-attention"}),
    ],
)
def test_the_memory_of_activations_is_what_was_estimated(home: Path, tmp_path, monkeypatch, model, options) -> None:
    """They are nearly all there is in large batches of small models."""
    if "samples" in options:
        options = {**options, "classifier": home / "judge"}
    check_memory(plan_of(home, model, tmp_path / "out", train_batch_size=32, **options), monkeypatch, 0.1)


@pytest.fixture(scope="module")
def medium(home: Path) -> str:
    """3.5 million weights, and a forward pass of one sample that keeps little beside them."""
    from diffusers import DDIMScheduler, DiTPipeline

    model = small_dit(layers=6, heads=4, head_dim=48)
    DiTPipeline(model, small_vae(), DDIMScheduler(num_train_timesteps=50)).save_pretrained(home / "medium")
    return "medium"


LESS = [
    {"optimizer_in_backward": True},
    {"fisher_storage": "host"},
    {"fisher_storage": "disk"},
    {"weights_dtype": "bfloat16"},
    {"weights_dtype": "bfloat16", "optimizer_in_backward": True, "fisher_storage": "disk"},
    {"mask_fraction": 0.3},
    {"mixed_precision": "bf16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", LESS, ids=str)
def test_the_memory_of_each_way_to_need_less_is_what_was_estimated(home, medium, tmp_path, monkeypatch, options):
    plan = plan_of(
        home, medium, tmp_path / "out", tie_embeddings=False, guidance_scale=1.0, train_batch_size=1, **options
    )
    check_memory(plan, monkeypatch, 0.1)


@pytest.mark.slow
def test_each_way_to_need_less_needs_less(home: Path, medium: str, tmp_path: Path) -> None:
    def needed(**options) -> dict[str, int]:
        plan = plan_of(home, medium, tmp_path / "out", tie_embeddings=False, train_batch_size=1, **options)
        return {stage: sum(parts.values()) for stage, parts in estimate_run(plan).memory.items()}

    plain, count = needed(), sum(p.numel() for p in small_dit(layers=6, heads=4, head_dim=48).parameters())
    freed = needed(optimizer_in_backward=True)
    for stage in ("Fisher", "iterations"):
        assert 0.75 * 4 * count < plain[stage] - freed[stage] < 4 * count
    stored = needed(fisher_storage="disk")
    assert plain["Fisher"] - stored["Fisher"] == pytest.approx(4 * count, rel=0.01)
    narrow = needed(weights_dtype="bfloat16")
    assert plain["iterations"] - narrow["iterations"] > 0.9 * 4 * count  # weights and gradients, 2 bytes less of each
    assert plain["sampling"] == pytest.approx(narrow["sampling"], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "work", "fisher", "mask"),
    [
        ({}, {}, 8, 8),
        ({}, {"fisher_storage": "host"}, 4, 4 + 4 * 0.75),
        ({}, {"fisher_storage": "disk"}, 4, 4 + 4 * 0.75),
        ({"gamma": None, "mask_fraction": 0.5}, {}, 8, 8 + 2 / 8),  # as found, and as one tensor for the host
    ],
)
def test_what_waits_in_the_hosts_memory_is_not_on_the_device(settings, work, fisher, mask) -> None:
    """Bytes for each weight, by hand; of the larger of two layers, with three quarters of the weights, while a mask is
    made of it. Meta tensors stand for those of a GPU."""
    model = nn.Sequential(nn.Linear(96, 96, bias=False), nn.Linear(96, 32, bias=False)).to("meta")
    count, trial = 96 * 128, Trial(1000, 1.0)
    method = SFRon(iterations=1, rule="sgd", **settings)
    given = Workload(
        read=1, held=0, sampled=1, steps=1, shape=(1, 2, 2), latent_shape=(1, 2, 2), fisher_batches=2, **work
    )
    found = estimate(model, [], method, Trials(trial, trial, trial, fisher=trial), given, {}).memory
    assert found["Fisher"]["Fisher sums"] == fisher * count
    assert sum(found["mask"].values()) == (4 + mask) * count
    assert found["Fisher"]["gradients"] == found["iterations"]["gradients"] == 4 * count


def test_what_is_alive_at_once_is_counted() -> None:
    model = nn.Linear(10, 10)
    kb = 1000

    def run(count: int) -> None:
        a = torch.zeros(count, 250)  # 1000 bytes for each
        b = a + 1
        view = b.view(-1)[1:]
        view.add_(1)
        del a, b
        torch.cat([view, view])

    def outside(count: int) -> None:
        model.weight.detach().add(0)
        run(count)

    for count in (1, 7):
        assert try_samples(run, count, model).peak == pytest.approx(3 * count * kb, abs=16)
        assert try_samples(outside, count, model).peak == pytest.approx(3 * count * kb, abs=16)
    given = torch.zeros(2500)
    assert try_samples(lambda count: given.sum(), 1, model).peak == 10 * kb + 4  # it is there beside the weights
    frozen = nn.Linear(50, 50)
    assert try_samples(lambda count: frozen.weight.detach().sum(), 1, model).peak == 10 * kb + 4
    assert try_samples(lambda count: frozen.weight.detach().sum(), 1, model, [frozen]).peak == 4


def test_a_batch_that_would_take_long_is_a_multiple_of_one_sample(monkeypatch) -> None:
    from unlearn_ext.jobs import trial as trials

    seen: list[int] = []

    def run(count: int) -> None:
        seen.append(count)
        torch.zeros(count, 250)

    assert try_samples(run, 8, nn.Linear(1, 1)).peak == 8000 and seen == [1, 1, 8, 8]  # watched, and timed
    monkeypatch.setattr(trials, "_CHEAP", 0.0)
    seen.clear()
    assert try_samples(run, 8, nn.Linear(1, 1)).peak == 8000 and seen == [1, 1]


def test_a_whole_batch_that_does_not_fit_is_a_multiple_of_one_sample() -> None:
    def run(count: int) -> None:
        if count > 1:
            raise torch.OutOfMemoryError
        torch.zeros(count, 250)

    assert try_samples(run, 8, nn.Linear(1, 1)).peak == 8000


def test_gradients_of_an_earlier_batch_are_there_beside_those_that_are_added() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))

    def loss() -> torch.Tensor:
        return model(torch.ones(1, 100)).sum()

    each = 4 * 100 * 100
    assert try_batch(model, loss).peak == pytest.approx(2 * each, rel=0.05)
    assert try_batch(model, loss, batches=3).peak == pytest.approx(3 * each, rel=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_slow_weights_are_those_of_the_groups_that_have_them() -> None:
    model = nn.ModuleDict({"first": nn.Linear(10, 10), "second": nn.Linear(10, 20)})

    def kept(**settings) -> int:
        method = SFRon(iterations=1, rule="sgd", gamma=None, **settings)
        each = sum(4 * p.numel() for p in model.parameters())
        return sizes_on_disk(model, method, checkpoints=1)["checkpoints"] - each

    first, second = (sum(4 * p.numel() for p in part.parameters()) for part in model.values())
    assert kept() == 0
    assert kept(slow_rate=0.5) == first + second
    assert kept(param_groups={"second*": {"slow_rate": 0.5}}) == second
    assert kept(slow_rate=0.5, param_groups={"second*": {"slow_rate": 1.0}}) == first
    assert kept(slow_rate=0.5, param_groups={"second*": {"lr": 0.1}}) == first + second


# --- Time -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_of_a_run_has_its_time(home: Path, tmp_path: Path) -> None:
    for model, options in (("text", {"classifier": home / "judge", "samples": 2}), ("ddpm", {})):
        plan = plan_of(home, model, tmp_path / model, **options)
        found = estimate_run(plan)
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert set(found.seconds) == set(ForgetRun(plan).run()["seconds"]) - {"mask"}  # which takes next to none
        assert ("judging" in found.memory) == ("judging" in found.seconds) == bool(options)


def test_images_that_cannot_be_read_are_no_error(home: Path, tmp_path: Path) -> None:
    save_digit_folders(tmp_path / "digits", per_class=4, names=NAMES)
    for path in (tmp_path / "digits").rglob("*.png"):
        path.write_bytes(b"no picture")
    plan = plan_of(home, "ddpm", tmp_path / "out", data=tmp_path / "digits")
    assert estimate_run(plan).seconds["decoding"] > 0
    assert not plan.data.unreadable


# --- Nothing is left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["text", "ddpm"])
def test_an_estimate_leaves_no_trace(home: Path, tmp_path: Path, model: str) -> None:
    plan = plan_of(home, model, tmp_path / "out", classifier=home / "judge", samples=1)
    networks = [plan.model, *other_networks(plan)]
    networks[-1].train()
    files = sorted(home.rglob("*"))

    def state() -> list[torch.Tensor]:
        numbers = [generator.get_state() for generator in plan.task.generators()] + [torch.get_rng_state()]
        modes = [torch.tensor([m.training for n in networks for m in n.modules()])]
        return numbers + modes + [t.clone() for n in networks for t in n.state_dict().values()]

    before = state()
    estimate_run(plan)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(p.grad is None for n in networks for p in n.parameters())
    assert not plan.pictures.taken and not (tmp_path / "out").exists() and files == sorted(home.rglob("*"))


def test_the_table_of_a_large_model_fits_the_line(capsys) -> None:
    from unlearn_ext.cli.forget_report import show_estimate
    from unlearn_ext.cli.report import plain_console
    from unlearn_ext.jobs.estimate import Estimate

    stages = ("encoding", "Fisher", "mask", "iterations", "sampling", "judging", "FID")
    parts = {"weights": 2_700_000_000, "other networks": 10_000_000, "gradients": 0, "activations": 90_000_000_000}
    found = Estimate(torch.device("cpu"), dict.fromkeys(stages, parts), {"FID_real": 1.0}, {})
    show_estimate(found, [], plain_console())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "gradients" not in text and "FID real 1 s" in text
    assert all(stage in text for stage in stages) and text.count("92710.0") == 8 and text.count("activations") == 7
