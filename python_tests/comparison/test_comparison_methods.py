"""What methods need in a comparison, and what each is given."""

from __future__ import annotations

import pytest
import torch
from helpers.comparisons import Scripted, changed, workload

from unlearn_ext.comparison.choosing import choose
from unlearn_ext.comparison.run import Comparison
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.distributed.hashing import weights_hash
from unlearn_ext.errors import InputError
from unlearn_ext.run import teachers

pytest.importorskip("mlxtend")


def test_what_a_method_needs_has_to_be_given(tmp_path) -> None:
    work = workload(changed(held_out_size=0))
    with pytest.raises(InputError, match="needy looks at samples that nobody trained on, and --held-out-size is 0"):
        Comparison(work, [Scripted("needy", needs_held_out=True)], output_dir=tmp_path, models_dir=tmp_path)
    given = []
    runner = Scripted("other", lambda held_out, **rest: given.append(held_out))
    Comparison(work, [runner], count=1, output_dir=tmp_path, models_dir=tmp_path).run()
    assert given == [None]


def test_a_calibrated_method_is_asked_for_as_many_unseen_samples_as_it_refuses_to_start_without() -> None:
    (runner,) = choose(["sfron:forget_alpha=auto"], "published", "random")
    runner.method.calibration.start(torch.rand(runner.least_held_out))
    with pytest.raises(InputError, match="unseen samples to learn from"):
        runner.method.calibration.start(torch.rand(runner.least_held_out - 1))


@pytest.mark.parametrize("scenario", ["random", "class"])
def test_calibrated_forgetting_is_compared(tmp_path, scenario) -> None:
    work = workload(changed(scenario=scenario))
    runners = choose(
        ["sfron:forget_alpha=auto,iterations=2,calibrate_every=1,lr=0.05,gamma=none"], "published", scenario
    )
    comparison = Comparison(work, runners, count=1, output_dir=tmp_path, models_dir=tmp_path)
    (found,) = comparison.run()["methods"].values()
    (run,) = found["runs"]
    assert [entry["iteration"] for entry in run["calibration"]["path"]][:2] == [0, 1] and not found["failed"]
    assert found["settings"]["target_accuracy"] == (0.0 if scenario == "class" else None)
    assert ("accuracy" in run["calibration"]["path"][0]) == (scenario == "class")


def test_a_methods_own_random_network_is_the_seeds_unless_its_seed_is_given(monkeypatch) -> None:
    """Only the teacher differs between two runs of the same weights, batches and generator."""
    taught: list[int] = []
    drawn = teachers._drawn_anew

    def watched(model, seed):
        taught.append(seed)
        return drawn(model, seed)

    monkeypatch.setattr(teachers, "_drawn_anew", watched)

    def weights(text: str, seed: int) -> str:
        (runner,) = choose([text], "published", "random")
        generator = torch.Generator().manual_seed(0)
        batches = [[(torch.randn(8, 1, 28, 28, generator=generator), torch.arange(8))] for _ in range(2)]
        model = SmallResNet(seed=0)
        runner(model, *batches, None, seed)
        return weights_hash(model.state_dict().items())

    text = "bad_teacher:iterations=1"
    found = [weights(text, 0), weights(text, 1), weights(f"{text},seed=0", 1), weights(f"{text},seed=1", 0)]
    assert taught == [0, 1, 0, 1]
    assert found[0] == found[2] != found[1] == found[3]
    own, given = (choose([one], "published", "random")[0].settings() for one in (text, f"{text},seed=0"))
    assert (own["seed"], given["seed"]) == ("the run's", 0), "records of both are no others'"
    (other,) = choose(["sfron"], "published", "random")
    assert "seed" not in other.settings()
