"""Numbers as users give them: of Python, NumPy and PyTorch."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from unlearn_ext import InputError
from unlearn_ext.methods import SSD, Scrub, SFRon
from unlearn_ext.methods.calibration import TargetAccuracy
from unlearn_ext.tasks import Classification
from unlearn_ext.utils.arguments import (
    as_number,
    check_choice,
    check_count,
    check_device,
    check_finite,
    check_number,
    check_seed,
    describe,
)

INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
FLOATS = [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5)]
FLOATS += [torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, requires_grad=True), Fraction(1, 2)]
FLOATS += [np.longdouble(0.5)]
NO_NUMBERS = ["3", None, [3], (3,), np.array([3]), torch.tensor([3]), 3j, np.complex64(3), torch.tensor(3j), int]
NO_NUMBERS += [True, False, np.bool_(True), torch.tensor(True), torch.empty((), device="meta")]


@pytest.mark.parametrize("value", INTEGERS)
def test_integers(value) -> None:
    for number in (check_count("n", value), check_finite("n", value), check_seed("n", value), as_number(value)):
        assert type(number) is int and number == 3


@pytest.mark.parametrize("value", FLOATS)
def test_floats(value) -> None:
    number = check_finite("x", value)
    assert type(number) is float and number == 0.5 and json.dumps(number) == "0.5"
    with pytest.raises(InputError, match=r"n: expected an integer from 1, got 0.5"):
        check_count("n", value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value) -> None:
    assert as_number(value) is None
    for check in (check_count, check_finite, check_seed):
        with pytest.raises(InputError, match=r"^n: expected .*, got "):
            check("n", value)


@pytest.mark.parametrize("nan", [math.nan, np.float32("nan"), torch.tensor(math.nan)])
def test_nan_never_fits(nan) -> None:
    with pytest.raises(InputError, match="x: expected anything, got nan"):
        check_number("x", nan, "anything", lambda x: True)
    with pytest.raises(InputError, match="got nan"):
        check_count("x", nan)


@pytest.mark.parametrize("huge", [2**63, 10**5000, np.uint64(2**63), 2**64, -(10**5000)], ids=[*"abcde"])
def test_integers_that_are_too_large(huge) -> None:
    """Python itself refuses to print one of 5,000 digits."""
    with pytest.raises(InputError, match=r"n: expected an integer from 1( to 2\^63 - 1)?, got (-?\d+$|an integer of)"):
        check_count("n", huge)
    assert check_count("n", 2**63 - 1) == 2**63 - 1
    assert "integer of 16610 bits" in describe(10**5000) and len(describe([10**5000])) < 80
    with pytest.raises(InputError, match="x: expected a finite number from 0, got what no float holds"):
        check_finite("x", 10**5000)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 1.5, "1", None, True])
def test_seeds(seed) -> None:
    with pytest.raises(InputError, match=r"seed: expected an integer from -2\^63 to 2\^64 - 1, got "):
        Classification(seed=seed)
    for good in (-(2**63), 2**64 - 1, np.int64(5)):
        assert Classification(seed=good).seed == good
    from unlearn_ext.distributed.hashing import sample_numbers

    values = torch.randn(4, 3)
    drawn = [sample_numbers(values, good) for good in (-(2**63), -2, -1, 0, 2**63 - 1, 2**64 - 3)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 6


def test_what_takes_them_has_pythons_own() -> None:
    ssd = SSD(alpha=torch.tensor(2.0), lambd=np.float32(0.5), chunk=np.int64(4))
    assert json.dumps(vars(ssd)) == '{"alpha": 2.0, "lambd": 0.5, "per_sample": false, "chunk": 4}'
    calibration = TargetAccuracy(np.int32(3), torch.tensor(64), np.float64(0.25))
    assert json.dumps([calibration.every, calibration.samples, calibration.target]) == "[3, 64, 0.25]"


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 1e308}, {"epochs": 2.0**62}, {"iterations": 2**63}, {"forget_freq": 10**5000}],
    ids=lambda settings: next(iter(settings)),
)
def test_runs_that_would_never_end(settings) -> None:
    with pytest.raises(
        InputError,
        match=r"(iterations|forget_freq): expected .*(2\^63|integer)|epochs: .* more iterations than can be counted",
    ):
        SFRon(**settings).begin({"forget": 2, "retain": 7})


def test_scrubs_epochs() -> None:
    with pytest.raises(InputError, match=r"epochs: 4\.61169e\+18 passes are more iterations than can be counted"):
        Scrub(epochs=2**62, msteps=1).begin({"forget": 2, "retain": 7})


def test_a_device_by_name() -> None:
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="where: expected one such as"):
        check_device("nowhere", "where")


def test_descriptions_are_short() -> None:
    for value in ("a" * 10_000, ["a"] * 10_000, {str(i): i for i in range(10_000)}, torch.zeros(10_000), object()):
        assert len(describe(value)) < 120


@pytest.mark.parametrize("value", ["c", ["a"], {"a": 1}, None, torch.ones(2)])
def test_what_is_no_choice(value) -> None:
    """Whatever it is: a list has no hash, and a tensor has no truth."""
    check_choice("x", "a", {"a": 1, "b": 2})
    with pytest.raises(InputError, match="x: expected one of a, b, got "):
        check_choice("x", value, {"a": 1, "b": 2})
