"""The registry of methods: names, entry points, methods as text, and the table in the guide."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.models import make

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import METHODS, Method, Row, SFRon, available, find, parse, registry
from unlearn_ext.methods.row import CLASSIFICATION
from unlearn_ext.methods.table import markdown
from unlearn_ext.methods.values import ForgetLoss
from unlearn_ext.tasks import Classification

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Ascent(Method):
    """What another package could add."""

    name: ClassVar[str] = "ascent"
    row: ClassVar[Row] = Row("none", "−l", "mean loss", "sequential", "this file", CLASSIFICATION, "it cannot")

    def strength(self, iteration):
        return 1.0

    def forget_loss(self, losses, iteration):
        return ForgetLoss(-losses.mean())


class Package:
    """What importlib.metadata knows of an installed package."""

    def __init__(self, name: str):
        self.name = name


def entry(name: str, value: str, package: str) -> EntryPoint:
    made = EntryPoint(name, value, registry.GROUP)
    vars(made).update(dist=Package(package))
    return made


@pytest.fixture
def installed(monkeypatch):
    """Adds entry points as installed packages would."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])
    registry._entries.cache_clear()
    yield entries
    registry._entries.cache_clear()


# --- Names ----------------------------------------------------------------------------------------------------


def test_methods_are_found_by_their_names() -> None:
    assert all(method.name == name and find(name) is method for name, method in METHODS.items())
    with pytest.raises(
        InputError, match=r"no method 'sfrom', perhaps sfron is meant: choose from finetune, gradient_asc"
    ):
        find("sfrom")
    with pytest.raises(InputError, match="mini_unlearning is left out: its formula"):
        find("mini_unlearning")


def test_another_package_adds_a_method(installed) -> None:
    installed.append(entry("ascent", f"{__name__}:Ascent", "more"))
    assert find("ascent").__qualname__ == "Ascent"
    assert parse("ascent:lr=0.5").lr == 0.5
    methods, problems = available()
    assert list(methods) == [*METHODS, "ascent"] and problems == []
    assert "| `ascent` | none | −l | mean loss | sequential | classification | this file |" in markdown(
        methods.values()
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "ascent",
            "no_such_module:Ascent",
            r"the method ascent of more cannot be loaded \(ModuleNotFoundError: No mod",
        ),
        ("ascent", f"{__name__}:Missing", r"the method ascent of more cannot be loaded \(AttributeError: module"),
        ("ascent", f"{__name__}:make", "the method ascent of more is no subclass of unlearn_ext.methods.Method"),
        ("climb", f"{__name__}:Ascent", "the method climb of more has to have name = 'climb' and a row"),
    ],
)
def test_a_broken_entry_point_is_one_sentence_and_breaks_no_other(installed, name, value, words) -> None:
    installed.append(entry(name, value, "more"))
    with pytest.raises(InputError, match=words):
        find(name)
    methods, problems = available()
    assert methods == METHODS and len(problems) == 1 and find("sfron") is SFRon


def test_a_name_that_two_have(installed) -> None:
    installed += [entry("sfron", f"{__name__}:Ascent", "more")]
    with pytest.warns(UserWarning, match="more has a method called sfron, as a built-in one is, which is used"):
        assert find("sfron") is SFRon
    installed[:] = [entry("ascent", f"{__name__}:Ascent", package) for package in ("more", "other")]
    with pytest.raises(InputError, match="more and other each have a method called ascent: remove one of them"):
        find("ascent")
    methods, problems = available()
    assert methods == METHODS and len(problems) == 1
    installed[:] = [entry("ascent", f"{__name__}:Ascent", "more")] * 2  # one package on two paths
    registry._entries.cache_clear()
    assert find("ascent").name == "ascent"


def test_installed_packages_are_looked_through_once(monkeypatch) -> None:
    looks: list[str] = []
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: looks.append(group) or entries)
    registry._entries.cache_clear()
    for name in (*METHODS, "sfron"):
        find(name)
    assert looks == [registry.GROUP]
    entries.append(entry("ascent", f"{__name__}:Ascent", "more"))  # while the process runs
    assert find("ascent").name == find("ascent").name == "ascent" and len(looks) == 2
    assert "ascent" in available()[0]
    entries.clear()
    assert "ascent" not in available()[0]
    registry._entries.cache_clear()


# --- As text --------------------------------------------------------------------------------------------------


def test_methods_as_text() -> None:
    assert parse("sfron") == SFRon()
    expected = SFRon(forget_alpha=50, lr=1e-3, rule="adam", betas=(0.8, 0.99), protect=True, gamma=2)
    assert parse("sfron:forget_alpha=50, lr=1e-3,rule=adam,betas=(0.8, 0.99),protect=true,gamma=2") == expected
    assert parse("sfron:gamma=none").gamma is None and parse("sfron:max_norm=None").max_norm is None
    preset = SFRon.preset("cifar10-resnet18", iterations=7)
    assert parse("sfron@cifar10-resnet18:iterations=7") == preset
    assert parse("sfron@cifar10-resnet18:iterations=7", lr=9.0, iterations=3, fraction=1) == preset
    assert parse("sfron:lr=0.5", lr=9.0, iterations=3, fraction=1) == SFRon(lr=0.5, iterations=3)
    assert parse("sfron:param_groups={'conv.*': {'lr': 0.1}}").param_groups == {"conv.*": {"lr": 0.1}}
    assert isinstance(Unlearner(make(), Classification(), "sfron:forget_alpha=3").method, SFRon)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "a method is name, name@preset or name:key=value,key=value; got ''"),
        ("sfron:", "ends where settings should follow: leave : out"),
        ("sfron@", "ends where a preset should follow: leave @ out"),
        ("sfron@ : lr=1", "'sfron@' ends where a preset should follow: leave @ out"),
        ("sfron@cifar10-resnet18:", "ends where settings should follow: leave : out"),
        (
            "descent_to_delete",
            "descent_to_delete is for one convex model, with a proof, and stands apart",
        ),
        ("retrain", "retrain is no method but the reference of unlearn-ext compare"),
        ("scrub:iterations=5", "scrub has no setting 'iterations': its settings are "),
        ("sfron@cifar", "SFRon has no preset 'cifar': choose from cifar10-resnet18"),
        ("sfron:lr", "sfron: expected key=value between commas, got 'lr'"),
        ("sfron:lr=0.1,lr=0.2", "sfron: lr is given twice"),
        ("sfron:alpha=1", "sfron has no setting 'alpha': "),
        ("sfron:forget_alfa=1", "sfron has no setting 'forget_alfa': perhaps forget_alpha is meant"),
        ("sfron:lr=fast", "sfron: lr is a number, got 'fast'"),
        ("sfron:lr=true", "sfron: lr is a number, got 'true'"),
        ("sfron:iterations=2.5", "sfron: iterations is an integer, got '2.5'"),
        ("sfron:protect=1", "sfron: protect is true or false, got '1'"),
        ("sfron:rule=1", "sfron: rule is a word, got '1'"),
        ("sfron:betas={[1]:2}", "sfron: betas is a tuple, got '{[1]:2}'"),
        pytest.param(f"sfron:lr={'-' * 5000}1", "sfron: lr is a number, got '----", id="deep"),
        ("sfron:mask=file", "sfron: mask cannot be given as text: set it in Python"),
        ("sfron:lr=-1", "lr: expected a finite number from 0, got -1"),
        pytest.param(
            f"sfron:lr=1{'0' * 400}", "lr: expected a finite number from 0, got what no float holds", id="large"
        ),
        ("bad_teacher:seed=99999999999999999999999", "seed: expected an integer from 0 to 2^64 - 1, got 9999999999"),
        ("bad_teacher:seed=18446744073709551616", "seed: expected an integer from 0 to 2^64 - 1, got 18446744073709"),
        ("bad_teacher:seed=-1", "seed: expected an integer from 0 to 2^64 - 1, got -1"),
    ],
)
def test_text_that_is_no_method(spec, words) -> None:
    with pytest.raises(InputError) as caught:
        parse(spec)
    assert words in str(caught.value)


def test_every_seed_that_is_taken_can_be_drawn_from() -> None:
    for seed in (0, 2**64 - 1):
        torch.Generator().manual_seed(parse(f"bad_teacher:seed={seed}").seed)


# --- The table ------------------------------------------------------------------------------------------------


def test_the_page_holds_the_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "unlearn_ext.methods"],
        capture_output=True,
        encoding="utf-8",
        check=True,
        cwd=ROOT,
    ).stdout
    text = (ROOT / "docs/guides/methods.md").read_text(encoding="utf-8")
    begin, end = "<!-- methods: python -m unlearn_ext.methods -->\n", "<!-- /methods -->\n"
    assert text.count(begin) == text.count(end) == 1
    assert text.split(begin)[1].split(end)[0].strip("\n") == printed.strip("\n")
    assert all(f"| `{name}` |" in printed for name in METHODS)


def test_a_method_says_why_it_does_not_run_on_a_task() -> None:
    class Elsewhere(Classification):
        kind = "class-conditional diffusion"

    with pytest.raises(
        InputError, match="ascent does not run on class-conditional diffusion, only on classification: it"
    ):
        Unlearner(make(), Elsewhere(), Ascent(rule="sgd", lr=0.1))


# --- Presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_defaults_presets_and_rows_are_whole(name) -> None:
    method = METHODS[name]
    parse(name)
    for preset in method.presets:
        assert parse(f"{name}@{preset}") == method.preset(preset)
    row = method.row
    assert all((row.saliency, row.forget_term, row.retain_term, row.geometry, row.source)) and row.tasks
    assert (row.forget_term == "none") == (not method.forgets) and (row.retain_term == "none") == (not method.retains)


def test_ablations_leave_out_what_their_names_say() -> None:
    whole = parse("sfron@cifar10-resnet18")
    assert (whole.update, whole.lambd, whole.gamma) == ("sequential", 0.5, 1.0)
    for preset, expected in (
        ("r", ("joint", 0.0, None)),
        ("r-on", ("sequential", 0.0, None)),
        ("fr-on", ("sequential", 0.5, None)),
    ):
        part = parse(f"sfron@cifar10-resnet18-{preset}")
        assert (part.update, part.lambd, part.gamma) == expected
        assert (part.forget_alpha, part.lr, part.iterations) == (25.0, 0.01, 1500)
    dual = parse("sfron@cifar10-resnet18-dual")
    assert (dual.dual_state, dual.forget_rule, dual.forget_lr, dual.rule, dual.lr) == (
        True,
        "adam",
        1e-4,
        "momentum",
        0.01,
    )
