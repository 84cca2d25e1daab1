"""Runs commands, each a JSON list of arguments, and computes what they should have found. Each writes to a folder of
its own; in one called "spoiled" the pictures taken after are what a diverged model gives."""

import contextlib
import io
import json
import sys

import torch
from helpers.fid import features_of, frechet

from unlearn_ext.cli import main
from unlearn_ext.jobs import plan as module

weight = torch.load(sys.argv[1])["AvgPool.weight"]
plans, make = [], module.make_plan


def kept(options):
    plans.append(make(options))
    return plans[-1]


module.make_plan = kept
take = module.Pictures.take


def spoiled(self, when, progress):
    take(self, when, progress)
    if when == "after" and plans[-1].options.output_dir.name == "spoiled":
        self.taken[when][-1] = torch.nan


module.Pictures.take = spoiled
answers = []
for arguments in map(json.loads, sys.argv[2:]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    plan = plans[-1]
    shown = plan.pictures.labels != 3
    real = [i for i in range(len(plan.data)) if int(plan.data.labels[i]) in plan.pictures.retained]
    if plan.pictures.taken:
        real = [i for i in real if i not in plan.data.unreadable]
        features = features_of(torch.stack([plan.data[i]["pixel_values"] for i in real]), weight)
    expected = {
        when: frechet(features, features_of(own[shown], weight))
        for when, own in plan.pictures.taken.items()
        if bool(own.isfinite().all())
    }
    retained = list(plan.pictures.retained)
    answers.append({"code": code, "out": out.getvalue(), "retained": retained, "real": len(real), **expected})
print(json.dumps(answers))
