"""README and docs: every Python block runs, and every unlearn-ext line has options that the command has."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from helpers.processes import environment

from unlearn_ext import cli
from unlearn_ext.evaluation import accuracy, predict

pytestmark = pytest.mark.native_only

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("contexts", Path(__file__).with_name("contexts.py"))
contexts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(contexts)

ALL = [str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]]
SLOW = {"README.md", "docs/quickstart.md"}
SLOW |= {f"docs/guides/{name}.md" for name in ("certified", "diffusion", "extending", "processes")}


def run_page(page: str, names: dict, most: int | None = None) -> dict:
    """The blocks in turn, as one session; a traceback shows the page's own lines."""
    text, names = (ROOT / page).read_text(), {"__name__": page, **names}
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for block in itertools.islice(blocks, most):
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(ROOT / page), "exec", dont_inherit=True), names)
    return names


def test_the_readme_is_short_and_its_links_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert len(links) > 20 and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.process
@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = [path.read_text() for path in (tmp_path / "site" / "reference").rglob("*.html")]
    assert len(pages) == len(list(ROOT.glob("docs/reference/*.md"))) and not any(":class:" in page for page in pages)


def test_every_page_with_python_is_run() -> None:
    assert {page for page in ALL if "```python" in (ROOT / page).read_text()} == contexts.PAGES.keys()


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in contexts.PAGES]
)
def test_the_blocks_of_a_page_run(page, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with contexts.context(page) as names:
        names = run_page(page, names)
    if page == "README.md":
        check_forgotten(names)


@pytest.mark.slow
def test_the_readme_makes_a_transformers_model_forget() -> None:
    check_forgotten(run_page("README.md", contexts.trained_on_digits(contexts.vit(), 12), most=1))


def check_forgotten(names: dict) -> None:
    split = names["split"]
    logits, labels = predict(names["model"], [(split.test_images, split.test_labels)])
    gone = labels == 3
    assert accuracy(logits[gone], labels[gone]) <= 0.02
    assert accuracy(logits[~gone], labels[~gone]) >= 0.75


# --- Commands -------------------------------------------------------------------------------------------------


def commands() -> dict[str, click.Command]:
    return typer.main.get_command(cli._app()).commands


def lines_of(text: str) -> Iterator[list[str]]:
    """The words of each unlearn-ext command in the bash blocks."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words[:1] == ["unlearn-ext"]:
                    yield words[1:]


@pytest.mark.parametrize("page", ALL)
def test_the_options_on_a_page_are_those_of_the_command(page) -> None:
    text = (ROOT / page).read_text()
    found = commands()
    for name, *words in lines_of(text):
        found[name].make_context(name, words)
    spans = re.findall(r"`((?:unlearn-ext|--)[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for span in spans:
        name = next((word for word in span.split()[1:2] if word in found), None)
        chosen = [found[name]] if name else found.values()
        known = {option for command in chosen for p in command.params for option in (*p.opts, *p.secondary_opts)}
        if not page.startswith("docs/results") or name:  # where benchmarks have options, too
            assert set(re.findall(r"--[a-z][\w-]*", span)) <= known, (page, span)
