"""Runs commands, each a JSON list of arguments, and computes what they should have found. Each writes to a folder of
its own; in one called "spoiled" the pictures taken after are what a diverged model gives."""

import contextlib
import io
import json
import sys

import torch
from helpers.fid import features_of, frechet

from unlearn_ext.cli import main
from unlearn_ext.jobs import job as module

weight = torch.load(sys.argv[1])["AvgPool.weight"]
jobs = []


class Kept(module.ForgetJob):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        jobs.append(self)


module.ForgetJob = Kept
take = module.Pictures.take


def spoiled(self, when, progress):
    take(self, when, progress)
    if when == "after" and jobs[-1].options.output_dir.name == "spoiled":
        self.taken[when][-1] = torch.nan


module.Pictures.take = spoiled
answers = []
for arguments in map(json.loads, sys.argv[2:]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    job = jobs[-1]
    kept = job.pictures.labels != 3
    real = [i for i in range(len(job.data)) if int(job.data.labels[i]) in job.pictures.retained]
    if job.pictures.taken:
        real = [i for i in real if i not in job.data.unreadable]
        features = features_of(torch.stack([job.data[i]["pixel_values"] for i in real]), weight)
    expected = {
        when: frechet(features, features_of(own[kept], weight))
        for when, own in job.pictures.taken.items()
        if bool(own.isfinite().all())
    }
    retained = list(job.pictures.retained)
    answers.append({"code": code, "out": out.getvalue(), "retained": retained, "real": len(real), **expected})
print(json.dumps(answers))
