"""One command for a machine with a GPU: build, test, measure, and write results/<gpu>.json.

    python benchmarks/gpu_check.py                              # DiT-XL/2 in diffusers' layout, under 8 minutes
    python benchmarks/gpu_check.py --device cpu --scale 0.01    # the same script where there is no GPU

Needs the test extra and, for a GPU, nvcc. The tests are those marked ``gpu``, which compare fused CPU with fused CUDA
for every dtype among others, and the operators' with --backend=cuda. The file is written whatever the outcome, and says
what passed; the exit code is 0 only if everything did. The sequential step at DiT-XL/2 and what it is checked against
take about 64 GB of GPU memory; --scale 0.3 fits 24 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unlearn_ext import ops
from unlearn_ext.native import loading
from unlearn_ext.profiling.shapes import named
from unlearn_ext.utils.device import device_name
from unlearn_ext.utils.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "dit-xl-2"
# What is left of eight minutes bounds each step, so that one that hangs is ended and told.
ALL_SECONDS, STEP_SECONDS = 470, 300
_BEGUN = time.perf_counter()


def run(*command: object) -> dict[str, Any]:
    """How a process ended: exit code, seconds, and the end of what it printed where it failed."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, *map(str, command)]
    limit = max(1.0, min(STEP_SECONDS, ALL_SECONDS - (started - _BEGUN)))
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, output = 124, f"{late.stdout or ''}\nended after {limit:.0f} s"
    result: dict[str, Any] = {"exit_code": status, "seconds": round(time.perf_counter() - started, 1)}
    if closing := re.search(r"^=*\s*(\d+ (?:passed|failed|skipped).*?)\s*=*$", output, re.MULTILINE):
        result["summary"] = closing.group(1)
    if status != 0:
        result["output"] = output[-4000:]
    return result


def build(device: str) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        backends = {kind: ops.backend(kind) for kind in dict.fromkeys(("cpu", torch.device(device).type))}
        failed = [kind for kind, backend in backends.items() if backend != "native"]
        outcome: dict[str, Any] = {"exit_code": int(bool(failed)), "backends": backends}
        if failed:
            outcome["output"] = f"no native kernels for {', '.join(failed)}"
    except (loading.BuildError, loading.ToolchainError) as error:
        outcome = {"exit_code": 1, "output": str(error)[-4000:]}
    return {**outcome, "seconds": round(time.perf_counter() - started, 1)}


def versions(device: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["capability"] = f"{major}.{minor}"
    return found


def check(device: str, scale: float, repeats: int | None, implementations: list[str] | None) -> dict[str, Any]:
    """Everything in turn; a step that fails does not keep the others from being made."""
    on_gpu = torch.device(device).type == "cuda"
    document: dict[str, Any] = {
        "device": device_name(device),
        "versions": versions(device),
        "threads": torch.get_num_threads(),
        "shapes": f"{SHAPES} (diffusers' layout), scaled by {scale:g}",
        "steps": {},
        "rows": [],
    }
    steps = document["steps"]

    def record(name: str, outcome: dict[str, Any]) -> None:
        steps[name] = outcome
        verdict = "ok" if outcome["exit_code"] == 0 else "FAILED"
        print(f"{name:<14} {verdict:<7} {outcome['seconds']:6.1f} s  {outcome.get('summary', '')}", flush=True)
        if "output" in outcome:
            print(outcome["output"], file=sys.stderr, flush=True)

    record("build", build(device))
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["-m", "gpu"] if on_gpu else ["python_tests/ops/test_products.py"]
    record("tests", run(*pytest, *tests))
    if on_gpu:
        record("operators", run(*pytest, "--backend=cuda", "-m", "", "python_tests/ops"))

    weights = max(round(scale * sum(map(_numel, named(SHAPES)))), 1000)
    options = ["--device", device, *(["--repeats", repeats] if repeats else [])]
    options += ["--implementations", *implementations] if implementations else []
    shaped = ["--shapes", SHAPES, "--weights", weights]
    scripts = {"bench_step": shaped, "bench_saliency": shaped, "bench_iteration": [] if scale >= 1 else ["--width", 24]}
    scripts = {name: [*options, *more] for name, more in scripts.items()}
    scripts["bench_dit"] = transformer(device, scale, repeats)
    with tempfile.TemporaryDirectory() as directory:
        for name, more in scripts.items():
            file = Path(directory, f"{name}.json")
            record(name, run(ROOT / "benchmarks" / f"{name}.py", *more, "--json", file))
            if file.is_file():
                document["rows"] += [{"benchmark": name, **row} for row in json.loads(file.read_text())["rows"]]
    return document


def transformer(device: str, scale: float, repeats: int | None) -> list[object]:
    """bench_dit's options: DiT-XL/2 whole or a tiny one. Nothing is compiled, which would take minutes; the plain loop
    copies gradients of 3 GB to the host, so there are few batches."""
    shape = ["--network", SHAPES] if scale >= 1 else ["--depth", 1, "--width", 24, "--heads", 2]
    options = ["--device", device, "--samples", 2, "--chunk", 2, "--repeats", repeats or 3]
    return [*options, *shape, "--implementations", "plain", "tuned", "ours_in_backward", "ours_per_sample", "passes"]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of DiT-XL/2's 749.8 M weights")
    parser.add_argument("--repeats", type=int, help="of every measurement; as many as take some seconds, unless given")
    parser.add_argument("--implementations", nargs="+", help="rivals to measure; all of them, unless given")
    parser.add_argument("--output", type=Path, help="the file to write instead of results/<gpu>.json")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        print("error: this torch sees no GPU; use --device cpu --scale 0.01 to try the script", file=sys.stderr)
        return 1
    started = time.perf_counter()
    document = check(arguments.device, arguments.scale, arguments.repeats, arguments.implementations)
    document["seconds"] = round(time.perf_counter() - started, 1)
    name = re.sub(r"[^\w.-]+", "-", document["device"]).strip("-").lower()
    path = arguments.output or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['seconds']:.0f} s in all; written to {path}")
    return int(any(step["exit_code"] != 0 for step in document["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
