"""From the text of --methods to what a comparison runs: which settings it takes, and what it says of them."""

from __future__ import annotations

import pytest

from unlearn_ext.comparison import choosing
from unlearn_ext.comparison.choosing import choose, complete, split_list
from unlearn_ext.errors import InputError


def test_methods_are_parted_by_commas_and_so_are_their_settings() -> None:
    assert split_list("sfron,sfron:forget_alpha=auto,lr=0.1, salun ,") == [
        "sfron",
        "sfron:forget_alpha=auto,lr=0.1",
        "salun",
    ]
    assert split_list("a:betas=(0.9,0.95),x={1:[2,3]},b") == ["a:betas=(0.9,0.95),x={1:[2,3]}", "b"]


def test_calibrated_forgetting_of_a_class_goes_to_0_unless_another_target_is_given() -> None:
    for text, scenario, target in (
        ("sfron:forget_alpha=auto", "class", 0.0), ("sfron:forget_alpha=auto", "random", None),
        ("sfron", "class", None), ("negative_gradient_plus:forget_alpha=auto,target_accuracy=0.2", "class", 0.2),
    ):  # fmt: skip
        (runner,) = choose([text], "published", scenario)
        assert getattr(runner.method, "target_accuracy", None) == target


def test_where_settings_come_from(monkeypatch) -> None:
    """Given ones go before tuned ones, and these before the published preset's."""
    tuned = {"sfron": {"lr": 0.5, "max_norm": None}, "sfron:lambd=0.1": {"lr": 0.25}}
    settings_of = {"class": tuned, "random": {}}
    monkeypatch.setattr(choosing, "tuned_settings", settings_of.__getitem__)

    def found(text, settings="tuned", scenario="class"):
        (runner,) = choose([text], settings, scenario)
        assert runner.label == text
        method = runner.method
        return runner.origin, method.lr, method.iterations, method.max_norm

    assert found("sfron") == ("tuned", 0.5, 1500, None)
    assert found("sfron:iterations=7, lr=0.75") == ("tuned, with iterations=7,lr=0.75", 0.75, 7, None)
    assert found("sfron:lambd=0.1") == ("tuned", 0.25, 1500, 7.0)
    assert found("sfron", "published") == ("published", 0.01, 1500, 7.0)
    assert found("sfron", "tuned", "random") == ("published", 0.01, 1500, 7.0)
    assert found("sfron@tinyimagenet-swin:lr=0.5") == ("tinyimagenet-swin, with lr=0.5", 0.5, 500, 7.0)
    (runner,) = choose(["salun:iterations=7"], "published", "random")
    assert runner.method.iterations == 7 and runner.method.epochs is None, "the preset's epochs would go before it"
    (runner,) = choose(["salun"], "published", "random")
    assert runner.method.epochs == 10 and runner.method.mask_fraction == 0.5
    settings_of["class"] = {"ssd": {"alpha": 2.0, "lambd": 0.5}}
    (runner,) = choose(["ssd:alpha=3.0"], "tuned", "class")
    assert (runner.method.alpha, runner.method.lambd, runner.origin) == (3.0, 0.5, "tuned, with alpha=3.0")
    with pytest.raises(InputError, match="ssd has no setting 'alfa': perhaps alpha is meant"):
        choose(["ssd:alfa=1"], "tuned", "class")
    with pytest.raises(InputError, match="--settings: expected tuned or published"):
        choose(["sfron"], "best", "class")


def test_all_are_those_that_can_be_compared() -> None:
    labels = [runner.label for runner in choose(["all"], "published", "random")]
    assert {"finetune", "salun", "scrub", "bad_teacher", "nabla_tau", "sfron", "ssd"} <= set(labels)
    assert not {"ug_clu", "esd"} & set(labels), "one learns new data, one is for diffusion"


# --- Which tuned settings suit a text ---------------------------------------------------------------------------

DUAL = "sfron:dual_state=true,forget_rule=adam"
CALIBRATED = "sfron:forget_alpha=auto"


def chosen(monkeypatch, text: str, *keys: str, settings: str = "tuned"):
    """Origin and learning rate; the tuned one is 1, 2, ... in the order of the keys."""
    tuned = {key: {"lr": float(i)} for i, key in enumerate(keys, 1)}
    monkeypatch.setattr(choosing, "tuned_settings", lambda scenario: tuned)
    (runner,) = choose([text], settings, "random")
    assert runner.label == text
    return runner.origin, runner.method.lr


def test_calibrated_forgetting_takes_no_settings_of_the_uncalibrated(monkeypatch) -> None:
    assert chosen(monkeypatch, CALIBRATED, "sfron", DUAL) == ("published, with forget_alpha=auto", 0.01)
    assert chosen(monkeypatch, f"{DUAL},forget_alpha=auto", "sfron", DUAL)[1] == 0.01
    assert chosen(monkeypatch, CALIBRATED, "sfron", CALIBRATED) == ("tuned", 2.0)
    assert chosen(monkeypatch, "sfron : forget_alpha = auto", "sfron", CALIBRATED) == ("tuned", 2.0)
    both = f"{DUAL},forget_alpha=auto"
    assert chosen(monkeypatch, both, "sfron", DUAL, CALIBRATED) == ("tuned, with dual_state=true,forget_rule=adam", 3.0)
    for uncalibrated in ("sfron", "sfron:forget_alpha=10"):
        assert chosen(monkeypatch, uncalibrated, CALIBRATED, "sfron")[1] == 2.0


@pytest.mark.parametrize(
    "text",
    [DUAL, "sfron:forget_rule=adam,dual_state=true", "sfron: dual_state = True , forget_rule=adam"],
)
def test_tuned_settings_are_found_by_what_the_text_means(text, monkeypatch) -> None:
    assert chosen(monkeypatch, text, "sfron", DUAL, CALIBRATED) == ("tuned", 2.0)
    assert chosen(monkeypatch, f"{text},lambd=0.1", "sfron", DUAL)[0] == "tuned, with lambd=0.1"


def test_the_most_of_what_is_given_and_nothing_else(monkeypatch) -> None:
    keys = ("sfron:lambd=0.1", "sfron", "sfron:gamma=2,lambd=0.1", "salun")
    assert chosen(monkeypatch, "sfron:gamma=2.0,lambd=1e-1", *keys) == ("tuned", 3.0)
    assert chosen(monkeypatch, "sfron:lambd=0.1", *keys) == ("tuned", 1.0)
    assert chosen(monkeypatch, "sfron:gamma=2", *keys) == ("tuned, with gamma=2", 2.0)
    assert chosen(monkeypatch, "sfron:lambd=0.1", "salun") == ("published, with lambd=0.1", 0.01)


# --- What is said of them ---------------------------------------------------------------------------------------


def test_a_method_without_a_preset_has_defaults_and_no_publication(monkeypatch) -> None:
    for settings in ("tuned", "published"):
        for name in ("negative_gradient_plus", "projected"):
            assert chosen(monkeypatch, name, "sfron", settings=settings)[0] == "defaults"
        assert chosen(monkeypatch, "projected:lr=0.5", settings=settings) == ("defaults, with lr=0.5", 0.5)
    assert chosen(monkeypatch, "projected", "projected") == ("tuned", 1.0)


def test_what_is_given_stands_beside_where_the_rest_is_from(monkeypatch) -> None:
    assert chosen(monkeypatch, "sfron:lr=10", "sfron") == ("tuned, with lr=10", 10.0)
    assert chosen(monkeypatch, "sfron:lr=10", "sfron", settings="published") == ("published, with lr=10", 10.0)


# --- Bad texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sfron@:lr=1", "'sfron@' ends where a preset should follow: leave @ out"),
        ("sfron:", "'sfron:' ends where settings should follow: leave : out"),
        ("ssd:", "'ssd:' ends where settings should follow: leave : out"),
        ("ssd@cifar10", "ssd has no presets: leave @cifar10 out"),
        ("sfron:lr=1,,gamma=2", "sfron: expected key=value between commas, got ''"),
        ("sfron:betas={[1]:2}", "sfron: betas is a tuple, got"),
        ("bad_teacher:seed=99999999999999999999999", "seed: expected an integer from 0 to 2^64 - 1"),
    ],
)
def test_a_text_that_is_no_method_is_one_sentence(text, words) -> None:
    for settings in ("tuned", "published"):
        with pytest.raises(InputError) as caught:
            choose([text], settings, "random")
        assert words in str(caught.value)


def test_a_text_is_completed_by_its_preset_and_what_it_does_not_give() -> None:
    assert complete("sfron : lr = 1", {"lr": 2, "max_norm": None}) == "sfron@cifar10-resnet18:lr = 1,max_norm=none"
    assert complete("ssd", {"alpha": 2.0}) == "ssd:alpha=2.0" and complete("projected", {}) == "projected"
    assert complete("salun:iterations=3", {}) == "salun@cifar10-resnet18:iterations=3,epochs=none"
