"""The folder that is written: modes, and links of the source."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from helpers.pipelines import save_ddpm_pipeline, save_dit_pipeline

from unlearn_ext import InputError
from unlearn_ext.models.pretrained import open_pretrained
from unlearn_ext.models.written import plan_result, write_result


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("models") / "dit")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_the_denoiser_follows_the_umask_and_copies_keep_their_mode(umask: int, dit: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dit, tmp_path / "source")
    (source / "run.sh").write_text("#!/bin/sh\n")
    for name, bits in (("run.sh", 0o755), ("model_index.json", 0o640), ("vae/config.json", 0o444)):
        (source / name).chmod(bits)
    (source / "run.sh").chmod(0o4755)
    before = os.umask(umask)
    try:
        write_result(source, open_pretrained(source), tmp_path / "out")
    finally:
        os.umask(before)
    weights = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert mode(weights) == 0o666 & ~umask
    assert mode(tmp_path / "out") == mode(weights.parent) == 0o777 & ~umask
    for name, bits in (("run.sh", 0o755), ("model_index.json", 0o640), ("vae/config.json", 0o444)):
        assert mode(tmp_path / "out" / name) == bits, name


def test_links_that_leave_the_folder_are_not_followed(dit: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dit, tmp_path / "source")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "private" / "key")
    (source / "docs").symlink_to(tmp_path / "private")
    (source / "inner").symlink_to("vae/config.json")
    opened = open_pretrained(source)
    plan = write_result(source, opened, tmp_path / "out")
    left = "a link that leaves the model's folder"
    assert {plan.left_out[name] for name in ("LICENSE", "docs")} == {left}
    assert (tmp_path / "out" / "inner").read_bytes() == (source / "vae" / "config.json").read_bytes()
    assert not (tmp_path / "out" / "inner").is_symlink()
    assert not any("secret" in path.read_text(errors="ignore") for path in (tmp_path / "out").rglob("*.*"))
    assert not (tmp_path / "out" / "LICENSE").exists() and not (tmp_path / "out" / "docs").exists()
    open_pretrained(tmp_path / "out")


def test_everything_of_the_source_is_copied_or_named(dit: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dit, tmp_path / "source")
    kept = ["README.md", "LICENSE", ".gitattributes", "docs/unlearning/a.txt", "feature_extractor/x.json", "a b/ü.txt"]
    for name in (*kept, ".git/config", "docs/.cache/x", "unlearning/result.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "safety_checker").symlink_to("feature_extractor")
    (source / "vae" / "again").symlink_to("../docs")
    (source / "docs" / "current").symlink_to("..")
    plan = write_result(source, open_pretrained(source), tmp_path / "out")
    assert plan.left_out == {
        ".git": "what a clone or a download leaves",
        "docs/.cache": "what a clone or a download leaves",
        "vae/again/.cache": "what a clone or a download leaves",
        "unlearning": "the record of the run that wrote the source",
        "docs/current": "a link to a folder that it is in",
        "vae/again/current": "a link to a folder that it is in",
        "transformer/diffusion_pytorch_model.safetensors": "the denoiser's weights as they were",
    }
    for name in (*kept, "safety_checker/x.json", "vae/again/unlearning/a.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {*plan.copied, "transformer/diffusion_pytorch_model.safetensors"}


def test_files_that_cannot_be_read_are_found_before_the_run(dit: Path, tmp_path: Path, monkeypatch) -> None:
    source = shutil.copytree(dit, tmp_path / "source")
    opened, access, folders = open_pretrained(source), os.access, Path.iterdir
    with monkeypatch.context() as patch:  # a superuser may read everything
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "model_index.json" and access(path, mode))
        with pytest.raises(InputError, match=r"model_index\.json cannot be read, and is to be copied into the result"):
            plan_result(source, opened)

    def closed(path: Path):
        if path.name == "vae":
            raise PermissionError(13, "Permission denied")
        return folders(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(InputError, match=r"vae cannot be read \(Permission denied\): it is to be copied"):
        plan_result(source, opened)


@pytest.mark.parametrize("name", ["vae", "vae/config.json", "model_index.json"])
def test_a_part_that_lies_elsewhere_is_refused(name: str, dit: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dit, tmp_path / "source")
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link that leaves the model's folder, and results hold copies"):
        open_pretrained(source)


def test_a_hub_cache_is_made_of_links(dit: Path, tmp_path: Path) -> None:
    """models--x--y/snapshots/<commit>/file -> ../../blobs/<hash>."""
    cache = tmp_path / "models--x--y"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in dit.rglob("*") if path.is_file())):
        shutil.copyfile(path, blobs / str(number))
        link = snapshot / path.relative_to(dit)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (tmp_path / "key").write_text("secret")
    (snapshot / "LICENSE").symlink_to(tmp_path / "key")
    plan = plan_result(snapshot, open_pretrained(snapshot))
    assert set(plan.copied) == set(plan_result(dit, open_pretrained(dit)).copied)
    assert plan.left_out["LICENSE"] == "a link that leaves the model's folder"


def test_another_models_blobs_lie_elsewhere(dit: Path, tmp_path: Path) -> None:
    secret = tmp_path / "models--x--secret" / "blobs" / "abc"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    for source in (tmp_path / "plain", tmp_path / "models--x--y" / "snapshots" / "0123"):
        shutil.copytree(dit, source)
        (source / "README.md").symlink_to(secret)
        (source / "notes").symlink_to(secret.parent)
        plan = plan_result(source, open_pretrained(source))
        left = "a link that leaves the model's folder"
        assert plan.left_out.items() >= {"README.md": left, "notes": left}.items(), plan
        (source / "vae" / "config.json").unlink()
        (source / "vae" / "config.json").symlink_to(secret)
        with pytest.raises(InputError, match="is a link that leaves the model's folder"):
            open_pretrained(source)


def test_leftovers_do_not_fill_an_empty_folder(tmp_path: Path) -> None:
    source = save_ddpm_pipeline(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".probe-ab12cd34").touch()
    write_result(source, open_pretrained(source), tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").exists()
