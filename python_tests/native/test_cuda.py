"""What only a GPU can show. Elsewhere these tests are skipped, and
--backend=cuda-on-host runs the same kernels."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.backends import PYTHON_BACKEND
from helpers.layouts import CHANNELS_LAST, DTYPES, RULES, assert_ulps, coin, normal, opmath, same_bits
from helpers.models import batches, make
from helpers.steps import FACTORS, HYPER, call, new_state
from torch import Tensor

from unlearn_ext import SaliencyMask, Unlearner, UnlearnOptimizer, ops
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((), (0,), (1,), (31,), (33, 3), (5, 7, 3, 3), (70_001,))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or PYTHON_BACKEND, reason="needs a GPU and native kernels"),
]


@pytest.fixture(scope="module", autouse=True)
def native_kernels() -> None:
    assert ops.backend("cuda") == "native"


def to_cuda(state: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.to("cuda") for t in tensors] for name, tensors in state.items()}


@pytest.mark.parametrize("parts", ["forget", "retain", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_fused_cpu_matches_fused_cuda(rule: str, dtype: torch.dtype, parts: str, rng: torch.Generator) -> None:
    here = new_state(rng, SHAPES, dtype, rule, slow=True)
    there = to_cuda(here)
    forget = [normal(rng, shape, dtype) for shape in SHAPES] if parts != "retain" else []
    retain = [normal(rng, shape, torch.float32) for shape in SHAPES] if parts != "forget" else []
    bits = ops.pack_bits([coin(rng, shape) for shape in SHAPES])
    options = {"rule": rule, "step": 3, "slow_rate": 0.3, "protect": True, **HYPER, **FACTORS}
    call(here, forget, retain, bits=bits, **options)
    on_cuda = [[t.to("cuda") for t in tensors] for tensors in (forget, retain, bits)]
    call(there, *on_cuda[:2], bits=on_cuda[2], device="cuda", **options)
    for name, tensors in here.items():
        for a, b in zip(tensors, there[name], strict=True):
            assert_ulps(b.cpu(), a, 4.0 if a.dtype == opmath(dtype) else 1.0, a.double().abs().clamp_min(1e-2))


def test_stochastic_rounding_draws_the_same_on_both(rng: torch.Generator) -> None:
    weights = [normal(rng, (10_000,), torch.bfloat16), normal(rng, (77,), torch.bfloat16)]
    grads = [normal(rng, w.shape, torch.bfloat16) for w in weights]
    there = [w.to("cuda") for w in weights]
    ops.step_(weights, rule="sgd", scalars=ops.scalars(lr=0.001), retain_grads=grads, rounding_seed=7)
    ops.step_(
        there,
        rule="sgd",
        scalars=ops.scalars(lr=0.001, device="cuda"),
        retain_grads=[g.to("cuda") for g in grads],
        rounding_seed=7,
    )
    assert all(same_bits(a, b.cpu()) for a, b in zip(weights, there, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_sums_are_the_cpus_bits(dtype: torch.dtype, rng: torch.Generator) -> None:
    forget = [normal(rng, shape, dtype) for shape in (*SHAPES, (3_000_000,))]
    retain = [normal(rng, g.shape, torch.float32) for g in forget]
    bits = ops.pack_bits([coin(rng, g.shape) for g in forget])
    here = ops.gradient_products(forget, retain, bits)
    there = ops.gradient_products(*[[t.to("cuda") for t in tensors] for tensors in (forget, retain, bits)])
    assert torch.equal(here, there.cpu())
    again = ops.gradient_products(*[[t.to("cuda") for t in tensors] for tensors in (forget, retain, bits)])
    assert torch.equal(there, again)


def test_scalars_on_the_host_and_on_the_device_are_alike(rng: torch.Generator) -> None:
    weights = [normal(rng, (1000,), torch.float32).to("cuda")]
    other = [w.clone() for w in weights]
    grads = [torch.ones_like(w) for w in weights]
    ops.step_(weights, rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=grads)
    ops.step_(other, rule="sgd", scalars=ops.scalars(lr=0.1, device="cuda"), retain_grads=grads)
    assert torch.equal(weights[0], other[0])
    before = other[0].clone()
    skip = torch.tensor(True, device="cuda")
    ops.step_(other, rule="sgd", scalars=ops.scalars(lr=0.1, skip=skip, device="cuda"), retain_grads=grads)
    assert torch.equal(other[0], before)


def test_a_captured_step_replays_with_new_scalars_and_gradients(rng: torch.Generator) -> None:
    state = to_cuda(new_state(rng, SHAPES, torch.float32, "adamw", slow=True))
    grads = [normal(rng, shape, torch.float32).to("cuda") for shape in SHAPES]
    scalars = ops.scalars(lr=0.1, slow_rate=0.5, device="cuda")
    names = {"theta": "weights", "first": "first_moments", "second": "second_moments", "slow": "slow"}

    def step(tensors: dict[str, list[Tensor]], own: list[Tensor], numbers: Tensor) -> Tensor:
        arguments = {names[name]: values for name, values in tensors.items()}
        ops.step_(arguments.pop("weights"), rule="adamw", scalars=numbers, retain_grads=own, **arguments)
        return ops.gradient_products(own)

    warm = {name: [t.clone() for t in tensors] for name, tensors in state.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(warm, grads, scalars)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products = step(state, grads, scalars)
    for replay in range(3):
        expected = {name: [t.clone() for t in tensors] for name, tensors in state.items()}
        for g in grads:
            g.normal_()
        scalars.copy_(ops.scalars(lr=0.01 * (replay + 1), slow_rate=0.5, step=replay + 1))
        own = [g.clone() for g in grads]
        graph.replay()
        wanted = step(expected, own, scalars.clone())
        assert torch.equal(products, wanted)
        for name, tensors in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, state[name], strict=True))


def test_work_goes_to_the_current_stream(rng: torch.Generator) -> None:
    weights = [torch.zeros(1 << 20, device="cuda")]
    grads = [torch.zeros(1 << 20, device="cuda")]
    scalars = ops.scalars(lr=1.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the step below must wait for what was queued before it
        grads[0].fill_(-1.0)
        ops.step_(weights, rule="sgd", scalars=scalars, retain_grads=grads)
    stream.synchronize()
    assert bool((weights[0] == 1.0).all())


def launches(function) -> Counter:
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if "kernel" in event.name]
    return Counter(
        "step" if "step_kernel" in e.name else "products" if "products_kernel" in e.name else e.name for e in events
    )


@pytest.mark.parametrize("count", [538, 686])
def test_one_launch_as_long_as_the_table_holds_the_list(count: int) -> None:
    def tensors() -> list[Tensor]:
        return [torch.rand(40, device="cuda") for _ in range(count)]

    weights, first, second, grads = tensors(), tensors(), tensors(), tensors()
    bits = ops.pack_bits([w < 0.5 for w in weights])
    scalars = ops.scalars(lr=0.1, device="cuda")

    def iteration() -> None:
        ops.gradient_products(grads, (), bits)
        ops.step_(
            weights,
            rule="adamw",
            scalars=scalars,
            forget_grads=grads,
            bits=bits,
            first_moments=first,
            second_moments=second,
        )

    found = launches(iteration)
    assert found["step"] == -(-count // 576) and found["products"] == 1


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_no_step_waits_for_the_device(update: str) -> None:
    model = make().to("cuda")
    named = list(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    mask = SaliencyMask.from_dict({name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in named})
    optimizer = UnlearnOptimizer(named, rule="adamw", lr=1e-3, max_norm=1.0, slow_rate=0.5, slow_freq=2, mask=mask)
    grads = [torch.randn_like(p) for _, p in named]

    def iteration() -> None:
        if update == "joint":
            optimizer.joint_step(grads, grads)
        else:
            optimizer.forget_step(grads)
            optimizer.retain_step(grads)

    for _ in range(3):
        iteration()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_non_finite_gradient_writes_nothing_and_is_told_later() -> None:
    from unlearn_ext import NonFiniteError

    model = make().to("cuda")
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="adamw", lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    grads = [torch.randn_like(p) for p in model.parameters()]
    grads[1][0] = float("nan")
    optimizer.retain_step(grads)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(NonFiniteError):
        optimizer.raise_if_non_finite()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    weights = [torch.ones(1000, device="cuda:1")]
    with torch.cuda.device(0):
        ops.step_(weights, rule="sgd", scalars=ops.scalars(lr=0.5), retain_grads=[torch.ones_like(weights[0])])
    torch.cuda.synchronize(1)
    assert bool((weights[0] == 0.5).all())


def test_channels_last_weights_with_contiguous_gradients(rng: torch.Generator) -> None:
    values, grads = normal(rng, (8, 6, 3, 3), torch.float32), normal(rng, (8, 6, 3, 3), torch.float32)
    weight = values.to("cuda").contiguous(memory_format=torch.channels_last)
    assert weight.stride()[1] == 1 and CHANNELS_LAST.order == (0, 2, 3, 1)
    ops.step_([weight], rule="sgd", scalars=ops.scalars(lr=0.5), retain_grads=[grads.to("cuda")])
    torch.testing.assert_close(weight.cpu(), values - 0.5 * grads)


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_a_whole_run_follows_the_cpus(update: str) -> None:
    def run(device: str) -> tuple[Tensor, str]:
        model = make().double().to(device)
        method = SFRon(
            rule="adamw", lr=1e-3, iterations=20, forget_freq=2, forget_alpha=1.0, max_norm=0.5, update=update
        )
        result = Unlearner(model, Classification(), method).run(
            batches(3, 8, seed=1, dtype=torch.float64), batches(5, 8, seed=2, dtype=torch.float64)
        )
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]), result.backend

    (here, _), (there, backend) = run("cpu"), run("cuda")
    assert backend == "native"
    torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-8)
