"""Which folder is which class, as the command is told it, and paths as they are typed."""

from pathlib import Path

import pytest
from helpers.forgetting import plan_of, run
from helpers.pipelines import NAMES

from unlearn_ext.errors import InputError
from unlearn_ext.jobs.options import ForgetOptions
from unlearn_ext.jobs.plan import make_plan

SMALL = {"max_train_steps": 2, "train_batch_size": 2, "fisher_batches": 1, "num_inference_steps": 2}


def test_names_of_a_models_classes_need_no_map(home, tmp_path):
    plan = plan_of(home, "dit", tmp_path / "out", data=home / "named", forget_class="three")
    assert plan.forget_classes == [3] and {row.folder: row.index for row in plan.data.mapping} == {
        name: i for i, name in enumerate(NAMES)
    }


def test_a_guess_is_refused_until_it_is_confirmed(home, tmp_path, capsys):
    assert run(home, "ddpm", tmp_path / "out", "--forget-class", "three", data="named") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "guessed from their sorted order ('eight' as 0, 'five' as 1)" in error and "--class-map sorted" in error
    assert not (tmp_path / "out").exists()
    options = ForgetOptions(
        pretrained_model_name_or_path=home / "ddpm",
        data=home / "named",
        output_dir=tmp_path / "out",
        forget_class="three",
        class_map=Path("sorted"),
        **SMALL,
    )
    plan = make_plan(options)
    assert plan.forget_classes == [sorted(NAMES).index("three")] and plan.pretrained.classes.null_label == 10


def test_home_is_found_in_every_option(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "~").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    options = ForgetOptions(
        pretrained_model_name_or_path=Path("~/dit"),
        data=Path("~/named"),
        output_dir=Path("~/out"),
        forget_class="3",
        **SMALL,
    )
    assert options.data == home / "named" and options.output_dir == home / "out"
    assert make_plan(options).pretrained.folder == home / "dit"
    with pytest.raises(InputError, match=f"--class-map: there is no file {home}/absent.json"):
        ForgetOptions(
            pretrained_model_name_or_path=home / "dit",
            data=home / "named",
            output_dir=tmp_path / "out",
            forget_class="3",
            class_map=Path("~/absent.json"),
        )
