"""FID with Inception features: of known features, of the real network with made-up weights, and through the command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("torchmetrics")

from helpers.fid import features_of, frechet
from helpers.processes import ROOT, TESTS, environment, run_program

from unlearn_ext import InputError
from unlearn_ext.data.drawing import draw_real, even_shares
from unlearn_ext.evaluation.generated import frechet_distance, gaussian_distance
from unlearn_ext.evaluation.inception import INCEPTION_FILE, InceptionFID, inception_fid
from unlearn_ext.jobs.fid import RetainedFID

# What torchmetrics takes of torch-fidelity. The features of a picture are the means of its three colors, of bytes
# scaled to [-1, 1), times a matrix [3, 2048] that the weights file holds: so they are known in closed form.
PROGRAMS = Path(__file__).parent / "programs"
STAND_IN = {
    "__init__.py": "",
    "helpers.py": "def vassert(true, message):\n    assert true, message\n",
    "interpolate_compat_tensorflow.py": (
        "def interpolate_bilinear_2d_like_tensorflow1x(x, size, align_corners):\n    return x\n"
    ),
    "feature_extractor_inceptionv3.py": """
import torch
from torch import nn

LAYERS = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c "
    "Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"
)

class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2048))

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight

class FeatureExtractorInceptionV3(nn.Module):
    INPUT_IMAGE_SIZE = 299

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__()
        self.features_list = features_list
        for layer in LAYERS.split():
            setattr(self, layer, nn.Identity())
        self.AvgPool = Means()
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.requires_grad_(False)
""",
}


def write_stand_in(home: Path, **changed: str) -> Path:
    package = home / "packages" / "torch_fidelity"
    package.mkdir(parents=True)
    for name, text in STAND_IN.items():
        (package / name).write_text(changed.get(name.removesuffix(".py"), text))
    return package.parent


def save_means(path: Path) -> Tensor:
    """Weights of the stand-in; returns them."""
    weight = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    torch.save({"AvgPool.weight": weight}, path)
    return weight


def run_python(program: Path, packages: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """In a process of its own: torchmetrics looks for torch-fidelity once, when it is imported."""
    path = os.pathsep.join(map(str, (packages, ROOT, TESTS)))
    return run_program(program, *arguments, env=environment(PYTHONPATH=path))


def pictures(count: int, channels: int = 3, size: int = 12, *, seed: int, low: float = -1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, channels, 1, 1, generator=generator) * (1 - low) + low
    return (tint + 0.3 * torch.randn(count, channels, size, size, generator=generator)).clamp(-1.2, 1.2)


# --- The distance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "generated"), [(40, 12), (12, 40), (200, 12), (12, 12), (2, 3), (70, 65)])
def test_the_distance_in_fewer_dimensions_is_that_in_all(real: int, generated: int) -> None:
    """64 features: those of few samples are compared where they lie."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    a, b = (torch.randn(n, 64, dtype=torch.float64, generator=generator) @ mixing for n in (real, generated))
    b = 0.7 * b + 0.5
    assert gaussian_distance(a, b) == pytest.approx(frechet(a.numpy(), b.numpy()), rel=1e-9)
    assert gaussian_distance(a, a.clone()) == pytest.approx(0.0, abs=1e-6 * float(a.var(0).sum()))
    if min(real, generated) > 64:
        assert frechet_distance(a, b) == gaussian_distance(a, b)


# --- Known features ---------------------------------------------------------------------------------------------


@pytest.mark.process
def test_known_features_give_the_known_distance(tmp_path: Path) -> None:
    """And weights of another network, and those of none, give no distance."""
    weight = save_means(tmp_path / "weights.pth")
    torch.save({"other.weight": torch.zeros(3), "another.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"AvgPool.weight": torch.zeros(3, 2048)}, tmp_path / "zeros.pth")
    torch.save({"AvgPool.weight": torch.full((3, 2048), torch.nan)}, tmp_path / "nan.pth")
    sets = {"real": pictures(70, seed=1), "new": pictures(40, seed=2, low=-0.2), "grey": pictures(33, 1, seed=3)}
    save_file(sets, tmp_path / "pictures.safetensors")
    done = run_python(PROGRAMS / "known_features.py", write_stand_in(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    features = {name: features_of(own, weight) for name, own in sets.items()}
    for name, a, b in (("new", "real", "new"), ("grey", "real", "grey"), ("function", "grey", "new")):
        assert found[name] == pytest.approx(frechet(features[a], features[b]), rel=1e-4)
    assert found["again"] == found["new"] and found["real"] == pytest.approx(0.0, abs=1e-3)
    assert found["published"] is False and found["count"] == 70
    assert "other.pth does not hold Inception's weights (" in found["other"]
    for name in ("zeros", "nan"):
        assert f"{name}.pth holds weights whose features tell no pictures apart" in found[name]
    assert all(INCEPTION_FILE in found[name] and "\n" not in found[name] for name in ("other", "zeros", "nan"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from helpers.pipelines import save_ddpm_pipeline, save_digit_folders, save_dit_pipeline

    home = tmp_path_factory.mktemp("fid")
    save_digit_folders(home / "digits", per_class=5)
    (home / "digits" / "4" / "000.png").write_bytes(b"no picture")
    save_ddpm_pipeline(home / "ddpm")
    save_dit_pipeline(home / "dit")
    save_means(home / "weights.pth")
    return home


def arguments(home: Path, output: Path, *more: str, model: str = "ddpm", data: Path | None = None) -> list[str]:
    paths = {"pretrained-model-name-or-path": home / model, "data": data or home / "digits", "output-dir": output}
    small = {"max-train-steps": 2, "train-batch-size": 4, "fisher-batches": 1, "num-inference-steps": 2}
    given = [part for name, value in {**paths, **small}.items() for part in (f"--{name}", str(value))]
    return ["forget", *given, "--forget-class", "3", *more]


@pytest.fixture(scope="module")
def commands(home: Path) -> dict[str, dict]:
    """Folder -> what a command printed and wrote there, and the distances in closed form."""
    weights = ("--fid-weights", str(home / "weights.pth"))
    given = {
        "whole": (*weights, "--samples", "3", "--guidance-scale", "4"),
        "spoiled": (*weights, "--samples", "2"),
        "dry": (*weights, "--dry-run", "--json", str(home / "plan.json")),
    }
    listed = [json.dumps(arguments(home, home / name, *more)) for name, more in given.items()]
    done = run_python(PROGRAMS / "judged_commands.py", write_stand_in(home), home / "weights.pth", *listed)
    assert done.returncode == 0, done.stderr
    answers = dict(zip(given, json.loads(done.stdout), strict=True))
    for answer in answers.values():
        assert answer["code"] == 0, done.stderr
        answer["out"] = " ".join(answer["out"].split())
    return answers


@pytest.mark.process
def test_the_command_measures_it(home: Path, commands: dict[str, dict]) -> None:
    answer, report = commands["whole"], json.loads((home / "whole" / "unlearning" / "result.json").read_text())
    found = report["fid"]
    for when in ("before", "after"):
        assert found[when] == pytest.approx(answer[when], rel=1e-4) and found[when] > 0
    assert found["before"] != found["after"]
    assert found["features"] == 2048 and found["generated"] == 8 * 3
    assert found["classes"] == [str(i) for i in answer["retained"]] and len(found["classes"]) == 8
    assert found["real"] == answer["real"] == sum(found["real_by_class"])
    assert found["real_by_class"] == [4 if label == 4 else 5 for label in answer["retained"]]
    assert found["sampling"] == report["sampling"] and found["sampling"]["guidance"] == 4.0
    assert found["published_weights"] is False and "error" not in found
    assert report["seconds"].keys() >= {"FID_real", "FID"} and report["verdict"].startswith("not verified")
    assert report["retained_classes"] == {"sampled": 8, "in_data": 9}
    assert "of 9 retained classes 8 are sampled" in answer["out"]
    numbers = f"(2048 Inception features; 24 generated by DDIM, eta 0, 2 steps, guidance 4; {found['real']} real)"
    assert "FID of 8 retained classes: " in answer["out"] and numbers in answer["out"]
    for words in ("compare before with after only", "from 4 to 5 real ones", "not those that published FIDs use"):
        assert words in answer["out"]


@pytest.mark.process
def test_a_distance_that_cannot_be_computed_is_said_and_the_model_kept(home: Path, commands: dict[str, dict]) -> None:
    answer = commands["spoiled"]
    assert "not computed after" in answer["out"] and "after: generated: not all pixels are finite" in answer["out"]
    found = json.loads((home / "spoiled" / "unlearning" / "result.json").read_text())["fid"]
    assert found["before"] == pytest.approx(answer["before"], rel=1e-4)
    assert found["after"] is None and "not all pixels are finite" in found["error"]
    assert (home / "spoiled" / "model_index.json").is_file()


@pytest.mark.process
def test_a_dry_run_checks_and_plans_it(home: Path, commands: dict[str, dict]) -> None:
    assert "FID: 128 generated against 40 real images, of 8 retained classes" in commands["dry"]["out"]
    plan = json.loads((home / "plan.json").read_text())
    assert plan["seconds"]["FID"] > 0 and plan["seconds"]["FID_real"] > 0 and not (home / "dry").exists()
    assert plan["memory"]["FID"]["features"] == plan["memory"]["iterations"]["features"] == 40 * 2048 * 4


# --- Which real images ------------------------------------------------------------------------------------------


def test_real_images_are_all_or_an_even_draw() -> None:
    assert even_shares([5, 100, 7], 1000) == [5, 100, 7]
    assert even_shares([5, 100, 50], 60) == [5, 28, 27] and even_shares([9, 9, 9], 9) == [3, 3, 3]
    labels = torch.tensor([0] * 5 + [1] * 40 + [2] * 9 + [3] * 30)
    assert draw_real(labels, [[0], [2]], seed=0, most=99).tolist() == [*range(5), *range(45, 54)]
    drawn = draw_real(labels, [[0], [1], [3]], seed=0, most=25)
    assert labels[drawn].bincount(minlength=4).tolist() == [5, 10, 0, 10] and len(drawn.unique()) == 25
    assert torch.equal(drawn, draw_real(labels, [[0], [1], [3]], seed=0, most=25))
    assert not torch.equal(drawn, draw_real(labels, [[0], [1], [3]], seed=1, most=25))
    unreadable = drawn[7:9].tolist()
    again = draw_real(labels, [[0], [1], [3]], seed=0, most=25, exclude=unreadable)
    assert len(again) == 25 and len(set(drawn.tolist()) - set(again.tolist())) == 2


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_bad_weights_are_one_sentence_before_anything_is_written(home: Path, tmp_path: Path, capsys, more) -> None:
    from unlearn_ext.cli import main

    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"weight": "not a tensor"}, tmp_path / "words.pth")
    save_file({"latents": torch.zeros(20, 4, 8, 8), "labels": torch.arange(10).repeat(2)}, tmp_path / "z.safetensors")
    cases = [
        (
            ("--fid-weights", str(tmp_path / "none.pth")),
            "--fid-weights: FID needs Inception's weights and there are none at",
            INCEPTION_FILE,
        ),
        (("--fid-weights", str(tmp_path / "text.pth")), "does not hold Inception's weights", INCEPTION_FILE),
        (("--fid-weights", str(tmp_path / "words.pth")), "does not hold Inception's weights", INCEPTION_FILE),
        (("--samples", "4"), "--samples does nothing by itself", "--classifier or --fid-weights"),
    ]
    for given, *words in cases:
        assert main(arguments(home, tmp_path / "out", *given, *more)) == 1
        check_sentence(capsys.readouterr().err, *words)
    given = ("--fid-weights", str(home / "weights.pth"))
    own = arguments(home, tmp_path / "out", *given, *more, model="dit", data=tmp_path / "z.safetensors")
    assert main(own) == 1
    check_sentence(capsys.readouterr().err, "--data holds latents", "leave --fid-weights out")
    assert not (tmp_path / "out").exists()


def check_sentence(error: str, *words: str) -> None:
    error = error.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    for part in words:
        assert part in error


def test_a_weights_file_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="does not hold Inception's weights"):
        InceptionFID(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("package", ["torch_fidelity", "torchmetrics"])
def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch, package: str) -> None:
    save_means(tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, package, None)
    sentence = rf'FID needs {package.replace("_", "-")}, which is not installed: pip install "unlearn_ext\[fid\]"'
    with pytest.raises(InputError, match=sentence):
        inception_fid(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), tmp_path / "weights.pth")


@pytest.mark.process
def test_packages_that_cannot_be_imported(tmp_path: Path) -> None:
    """A torchvision of another torch, and one that is not there."""
    save_means(tmp_path / "weights.pth")
    fits = f"its torchvision has to be the release that belongs to torch {torch.__version__}"
    cases = {
        "raise RuntimeError('operator torchvision::nms does not exist')": f"nms does not exist): {fits}",
        "raise ImportError('undefined symbol: _ZN')": f"undefined symbol: _ZN): {fits}",
        "import vision_that_is_not_there": "FID needs vision_that_is_not_there, which is not installed: pip install",
    }
    packages = [write_stand_in(tmp_path / str(i), __init__=code) for i, code in enumerate(cases)]
    done = run_python(PROGRAMS / "unimportable_packages.py", tmp_path, tmp_path / "weights.pth", *packages)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(words in line for words, line in zip(cases.values(), lines, strict=True))


def test_too_few_pictures_are_refused_before_the_network_is_loaded(home: Path) -> None:
    from unlearn_ext.data import open_data

    data = open_data(home / "digits", size=16, channels=1, classes=10)
    with pytest.raises(InputError, match="at least 2 generated pictures of the retained classes, got 1"):
        RetainedFID(home / "weights.pth", data, {2: [2]}, 1, seed=0)
    data.labels = torch.arange(50)
    with pytest.raises(InputError, match="at least 2 real images of the retained classes, got 1"):
        RetainedFID(home / "weights.pth", data, {2: [2]}, 16, seed=0)


# --- The real network -------------------------------------------------------------------------------------------


def save_random_inception(path: Path) -> None:
    """torch-fidelity's network with random weights of its own shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    load = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None  # its constructor loads a file
    try:
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = load
    torch.save(network.state_dict(), path)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_real_network_with_random_weights(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "random.pth"
    save_random_inception(path)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    real, new, grey = pictures(20, size=32, seed=1), pictures(12, size=32, seed=2, low=0), pictures(9, 1, 32, seed=3)
    features = []
    for own in (real, new, grey):
        pixels = ((own.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        with torch.no_grad():
            features.append(network(pixels)[0].double().numpy())
    fid = InceptionFID(path)
    fid.add_real(real)
    assert np.abs(fid.extract(real).numpy() - features[0]).max() <= 1e-5 * np.abs(features[0]).max()
    found = [fid.distance(new), fid.distance(grey), fid.distance(real)]
    wanted = [frechet(features[0], features[1]), frechet(features[0], features[2])]
    assert found[:2] == pytest.approx(wanted, rel=1e-3) and abs(found[2]) < 1e-6 * wanted[0]
    assert inception_fid(real, new, path) == found[0] and fid.published is False


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_real_network_by_a_root_of_a_matrix(tmp_path: Path) -> None:
    """64 features and more pictures: no dimension is left out, and scipy can take the root."""
    linalg = pytest.importorskip("scipy.linalg")
    save_random_inception(tmp_path / "random.pth")
    fid = InceptionFID(tmp_path / "random.pth", features=64)
    real, new = pictures(90, size=32, seed=1), pictures(80, size=32, seed=2, low=0)
    fid.add_real(real)
    a, b = (fid.extract(own).double().numpy() for own in (real, new))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fid.distance(new) == pytest.approx(float(wanted), rel=1e-5)
