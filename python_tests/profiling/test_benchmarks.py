"""The benchmarks' machinery at tiny scale: what they write, what they refuse, and that a wrong rival is caught."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.backends import PYTHON_BACKEND
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import saliency
from unlearn_ext.cli import main
from unlearn_ext.cli.profile import _show_memory
from unlearn_ext.errors import InputError
from unlearn_ext.profiling import memory, report, shapes, steps
from unlearn_ext.profiling.loop import Pass, loop, loop_holds
from unlearn_ext.profiling.tensors import Tensors
from unlearn_ext.profiling.timing import interleaved, interleaved_stages, quantile
from unlearn_ext.profiling.work import MismatchError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FIELDS = {
    "operator", "rule", "dtype", "weights", "tensors", "implementation", "p20_ms", "p50_ms", "p80_ms", "bytes",
    "gb_per_s", "fraction_of_loop", "speedup_of_fused",
}  # fmt: skip
SMALL = [(40, 33), (40,), (7, 5, 3), (1,)]
pytestmark = pytest.mark.skipif(PYTHON_BACKEND, reason="the loop is native")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def run_here(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> int:
    """The exit code of a script of benchmarks/, run as its own process would run it but in this one."""
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return ended.value.code


@pytest.mark.parametrize("script", ["bench_step.py", "bench_saliency.py", "bench_iteration.py", "bench_dit.py"])
def test_scripts_find_their_modules_from_any_directory(script, tmp_path, monkeypatch, capsys) -> None:
    """With the package installed and the checkout on no path, as after pip install."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert run_here(script, "--help", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")


def check_document(
    path: Path, operators: Sequence[str], implementations: Sequence[str], *further: str
) -> dict[str, Any]:
    document = json.loads(path.read_text())
    assert set(document) == {"device", "versions", "threads", "rows", *further}
    assert document["device"] and {"torch", "unlearn_ext"} <= set(document["versions"]) and document["threads"] >= 1
    assert {row["operator"] for row in document["rows"]} == set(operators)
    assert {row["implementation"] for row in document["rows"]} == set(implementations)
    for row in document["rows"]:
        assert set(row) == FIELDS
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        for key in ("weights", "tensors", "bytes", "gb_per_s", "speedup_of_fused"):
            assert row[key] > 0
        assert row["fraction_of_loop"] is None or row["fraction_of_loop"] > 0
    return document


# --- Scripts ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "operators", "implementations"),
    [
        (
            "bench_step.py",
            ["--weights=20000", "--implementations", "loop", "eager", "foreach", "torch_fused"],
            ["joint", "sequential"],
            ["fused", "loop", "eager", "foreach", "torch_fused"],
        ),
        (
            "bench_saliency.py",
            ["--weights=20000", "--operator", "ratio_bits", "--dtype", "float32"],
            ["ratio_bits"],
            ["fused", "loop", "eager", "foreach", "torch_compile"],
        ),
        (
            "bench_iteration.py",
            ["--batch-size=2", "--width=12"],
            ["sequential", "fisher"],
            ["fused", "eager", "torch_fused"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scripts_write_rows_and_print_a_table(
    script, options, operators, implementations, tmp_path, monkeypatch, capsys
) -> None:
    options = ["--repeats=2", "--threads=1", *options, "--json=rows.json", "--plot=rows.png"]
    assert run_here(script, *options, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    shown = capsys.readouterr().out
    check_document(tmp_path / "rows.json", operators, implementations)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, shown.splitlines())) <= 80
    assert "triad in the same run" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shapes", "dit"], "choose from dit-xl-2"),
        (["--shapes", "0x5"], "choose from dit-xl-2"),
        (["--shapes", "missing.safetensors"], "cannot read missing.safetensors"),
        (["--plot", "plot.docx"], "--plot: expected"),
    ],
    ids=str,
)
def test_scripts_say_in_one_sentence_what_is_wrong(options, words, tmp_path, monkeypatch, capsys) -> None:
    assert run_here("bench_step.py", "--weights=1000", *options, monkeypatch=monkeypatch, cwd=tmp_path) == 1
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


# --- unlearn-ext profile ------------------------------------------------------------------------------------


def profile(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run("-m", "unlearn_ext", "profile", "--repeats=2", "--threads=1", *arguments, cwd=cwd)


@pytest.mark.process
def test_profile_of_a_users_network_with_a_trace(tmp_path) -> None:
    (tmp_path / "nets.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(30, 20)\n")
    done = profile("--model", "nets:make", "--trace=[bold]x.json", "--json=rows.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[bold]x.json")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("620 weights in 2 tensors", "predicted ms", "measured ms", "mask bits", "peak", "moments"):
        assert word in done.stdout
    ways = ["fused", "loop", "eager", "torch_fused"]
    document = check_document(tmp_path / "rows.json", ["sequential"], ways, "passes", "memory")
    assert [row["pass"] for row in document["passes"]] == ["products", "forget_step", "products", "retain_step", "all"]
    assert all(row["measured_ms"] > 0 and row["predicted_ms"] > 0 for row in document["passes"])
    predicted = document["memory"]["predicted_bytes"]
    assert predicted == {
        "weights": 2480, "one gradient": 2480, "moments": 4960, "slow weights": 2480, "mask bits": 80, "peak": 12480
    }  # fmt: skip
    events = json.loads((tmp_path / "[bold]x.json").read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in ("products", "forget_step", "retain_step", "interpolate"):
        assert name in ranges


@pytest.mark.slow
def test_profile_of_a_file_and_of_a_known_network(tmp_path, monkeypatch, capsys) -> None:
    save_file(
        {"a": torch.zeros(5, 4), "b": torch.zeros(3), "i": torch.zeros(2, dtype=torch.int64)},
        tmp_path / "w.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    common = ["profile", "--repeats=2"]
    assert main([*common, "--shapes", "w.safetensors", "--rule=momentum", "--implementations=loop"]) == 0
    assert "23 weights in 2 tensors (w.safetensors)" in capsys.readouterr().out
    assert main([*common, "--shapes=sd-unet", "--weights=20000", "--dtype=bfloat16"]) == 0
    assert "of 859.5 M weights" in capsys.readouterr().out.replace("\n", " ")


MEMORY = Path(__file__).parent / "programs" / "predicted_memory.py"


@pytest.mark.process
def test_the_memory_is_what_the_shapes_predict(tmp_path) -> None:
    """20 M weights; the second measurement meets the memory that the first has freed."""
    done = run(MEMORY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, floor in zip(done.stdout.splitlines(), (20.125, 12.125), strict=True):
        predicted, taken = line.split()
        assert int(predicted) == pytest.approx(20e6 * floor, rel=1e-3)
        if taken == "None":
            pytest.skip("this system does not tell a process its peak")
        assert int(taken) == pytest.approx(int(predicted), rel=0.25)


def test_memory_that_cannot_be_measured_is_called_so(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    assert memory.measured(SMALL, "sgd", torch.float32, CPU) is None
    console = Console(width=80, record=True, file=io.StringIO())
    _show_memory(memory.predicted(SMALL, "sgd", torch.float32), None, console)
    assert "not measured" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "unet"], "choose from dit-xl-2"),
        (["--model", "nets"], "expected module:function"),
        (["--model", "nets:make"], "cannot be made: ModuleNotFoundError"),
        (["--model", "torch:float32"], "cannot be made"),
        (["--model", "a:b", "--shapes", "resnet18"], "give one of them"),
        (["--implementations", "eager,fast"], "expected some of fused, loop, eager"),
        (["--device", "toaster"], "expected one such as 'cpu', 'cuda' or 'cuda:0'"),
        (["--json", "missing/rows.json"], "--json: expected a file in a directory that exists"),
        (["--trace", "."], "--trace: expected a file"),
        (["--plot", "x.docx"], "--plot: expected"),
    ],
    ids=str,
)
def test_bad_input_to_profile_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and not shown.out


def test_a_file_that_is_no_safetensors_is_refused(tmp_path) -> None:
    for content in (b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}"):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"no safetensors file|no floating tensors"):
            shapes.named(str(tmp_path / "x.safetensors"))


# --- Shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "weights"),
    [
        ("dit-xl-2", 538, 749_826_464),
        ("dit-b-4", 234, 147_550_592),
        ("ddpm-cifar10", 328, 35_746_307),
        ("resnet18", 62, 11_173_962),
        ("sd-unet", 686, 859_520_964),
        ("300x1000", 300, 300_000),
    ],
)
def test_shapes_are_those_of_the_real_networks(name, tensors, weights) -> None:
    found = shapes.named(name)
    assert (len(found), shapes.count(found)) == (tensors, weights)
    for goal in (1, 20_000, 4_000_000, weights, 2 * weights):
        kept = shapes.cut(found, goal)
        assert kept and kept == found[: len(kept)]
    assert shapes.cut(found, None) == shapes.cut(found, weights) == found


def test_shapes_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = diffusers.DiTTransformer2DModel(num_embeds_ada_norm=1000, out_channels=8, num_layers=28)
    assert sorted(tuple(p.shape) for p in network.parameters()) == sorted(shapes.named("dit-xl-2"))


# --- Machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("operator", ["joint", "sequential"])
def test_rivals_compute_what_ours_does(operator, rule) -> None:
    work = getattr(steps, operator)(SMALL, rule, torch.float32, CPU)
    measurement = report.measure("small", work, ["loop", "eager", "foreach", "torch_fused"], repeats=1)
    assert [row["implementation"] for row in measurement.rows] == ["fused", "loop", "eager", "foreach", "torch_fused"]


@pytest.mark.slow
def test_a_compiled_rival_computes_what_ours_does() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        work = steps.sequential(SMALL, "adamw", dtype, CPU)
        measurement = report.measure("small", work, ["torch_compile"], repeats=1)  # refuses another result
        assert [row["implementation"] for row in measurement.rows] == ["fused", "torch_compile"]
        assert measurement.compile_seconds > 0


def test_a_rival_that_computes_something_else_is_caught() -> None:
    work = steps.joint(SMALL, "sgd", torch.float32, CPU)
    fused, loop_run = work.make["fused"](), work.make["loop"]()
    moved = work.result(None)

    def careless() -> None:
        fused()
        moved[0].mul_(1.01)

    with torch.no_grad():
        work.check({"fused": fused, "loop": loop_run})
        with pytest.raises(MismatchError, match="eager differs from ours"):
            work.check({"fused": fused, "eager": careless})
        with pytest.raises(MismatchError, match="the loop changes"):
            work.check({"fused": fused, "loop": careless})
        with pytest.raises(MismatchError, match="nothing has moved"):
            work.check({"fused": lambda: None})


def test_the_loop_leaves_everything_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        lists = [[torch.randn(s, generator=generator).to(dtype) for s in SMALL] for _ in range(3)]
        state = [torch.randn(s, generator=generator) for s in SMALL]
        words = [torch.full(((t.numel() + 31) // 32,), -1, dtype=torch.int32) for t in state]
        everything = [t for tensors in (*lists, state, words) for t in tensors]
        before = [t.clone() for t in everything]
        moved = Pass([lists[0], state], lists[1:], words)
        loop([moved])()
        assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))
        width, weights = dtype.itemsize, shapes.count(SMALL)
        assert moved.bytes == (4 * width + 8) * weights + sum(4 * w.numel() for w in words)


def test_bytes_are_the_floor_of_the_operators() -> None:
    one = [(32_000,)]
    for work, floor in (
        (steps.joint(one, "sgd", torch.float32, CPU), 24.125),
        (steps.sequential(one, "adamw", torch.float32, CPU), 4.125 + 28.125 + 4 + 36),
        (steps.sequential(one, "momentum", torch.float32, CPU), 4.125 + 20.125 + 4 + 28),
        (saliency.fisher(one, torch.float32, CPU), 12),
        (saliency.ratio(one, CPU), 8.125),
    ):
        assert work.bytes / work.weights == floor


def test_a_slow_loop_voids_the_comparison() -> None:
    moved = [Pass([[torch.zeros(1000)]], [[torch.zeros(1000)]])]  # 12,000 bytes
    assert loop_holds(moved, loop_seconds=1.0, triad_speed=12_000 / 0.91)
    assert not loop_holds(moved, loop_seconds=1.0, triad_speed=12_000 / 0.89)


def test_rivals_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(values) == 3 for values in seconds.values())
    order.clear()
    turns = {name: {stage: lambda both=name + stage: order.append(both) for stage in "12"} for name in "ab"}
    seconds = interleaved_stages(turns, repeats=2)
    assert " ".join(order) == "a1 a2 b1 b2" + " a1 a2 b1 b2" + " b1 b2 a1 a2"
    assert all(len(values) == 2 for stages in seconds.values() for values in stages.values())
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0 and quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0


@pytest.mark.process
def test_the_check_of_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    done = run(
        ROOT / "benchmarks" / "gpu_check.py",
        "--device=cpu", "--scale=0.001", "--repeats=2", "--implementations", "loop", "eager", "--output", file,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    scripts = {"bench_step", "bench_saliency", "bench_iteration", "bench_dit"}
    assert set(document["steps"]) == {"build", "tests", *scripts}
    assert all(step["exit_code"] == 0 for step in document["steps"].values())
    assert "passed" in document["steps"]["tests"]["summary"]
    assert {row["benchmark"] for row in document["rows"]} == scripts


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_of_a_gpu_says_when_there_is_none(tmp_path: Path) -> None:
    done = run(ROOT / "benchmarks" / "gpu_check.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: this torch sees no GPU")


def test_torchs_fused_optimizers_find_their_counts_on_the_weights_device() -> None:
    """On a GPU they read them there; the other ways read them on the host."""
    tensors = Tensors([(4, 3), (5,)], "adamw", torch.float32, torch.device("cpu"))
    fused, plain = tensors.optimizer(fused=True), tensors.optimizer(foreach=False)
    assert all(fused.state[w]["step"] is step for w, step in zip(tensors.weights, tensors.fused_steps, strict=True))
    assert all(plain.state[w]["step"] is step for w, step in zip(tensors.weights, tensors.steps, strict=True))
    assert {step.device for step in tensors.fused_steps} == {w.device for w in tensors.weights}
    assert not any(a is b for a in tensors.steps for b in tensors.fused_steps)
