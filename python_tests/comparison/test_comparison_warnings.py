"""What runs warn of stands in a comparison's document and below its table, and nowhere between."""

from __future__ import annotations

import io
import warnings

import torch
from helpers.models import batches
from rich.console import Console
from torch import nn

from unlearn_ext.comparison.run import document
from unlearn_ext.comparison.runners import MethodRunner
from unlearn_ext.comparison.table import show
from unlearn_ext.methods import Finetune

PROTOCOL = {"seeds": [3, 4], "scenario": "random", "train_size": 1000, "sizes": {"forget": 200}, "warnings": "rule"}


def record(summary: dict) -> dict:
    names = ("FA", "UA", "RA", "TA", "TA_retained", "MIA_entropy", "KL", "JS", "gap", "RTE", "RTE_share")
    return {"metrics": dict.fromkeys((*names, "CPU", "CPU_share"), 0.5), "training_seconds": 1.0, "summary": summary}


def test_a_runner_keeps_its_runs_warnings_and_does_not_print_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = MethodRunner("still", Finetune(lr=0.0, iterations=2))(
            model, batches(1, 6, seed=1), batches(2, 6, seed=2), None, seed=0
        )
    assert "no weight has moved in 2 iterations" in found["warnings"]["unmoved"]


def test_they_stand_below_the_table_once_for_each_kind() -> None:
    still, both = {"warnings": {"unmoved": "nothing moved"}}, {"warnings": {"unmoved": "x", "target": "not met"}}
    runs = {"a": [record(still), record(both)], "b": [record({}), record({"warnings": {}})]}
    references = {role: [record({})] * 2 for role in ("original", "retrained", "retrained_again")}
    found = document(PROTOCOL, references, runs, {"a": {}, "b": {}})
    assert [run["warnings"] for run in found["methods"]["a"]["runs"]] == [still["warnings"], both["warnings"]]
    text = io.StringIO()
    show(found, Console(file=text, width=80))
    whole = " ".join(text.getvalue().split())
    assert "Warning: a (seeds 3, 4): nothing moved." in whole and "Warning: a (seed 4): not met." in whole
    assert whole.count("Warning: ") == 2
