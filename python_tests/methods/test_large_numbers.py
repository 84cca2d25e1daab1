"""Numbers that are too large to be meant: one short sentence, from text as from Python."""

from __future__ import annotations

import pytest
from helpers.models import batches, make

from unlearn_ext import Unlearner
from unlearn_ext.errors import InputError
from unlearn_ext.methods import Finetune, Method, Scrub, SFRon, parse
from unlearn_ext.tasks import Classification

DIGITS = "9" * 5000
TEXTS = (DIGITS, "-" + DIGITS, DIGITS + ".5", "1e" + DIGITS, "0x" + "f" * 5000, f"({DIGITS},0.9)", "1e400", "nan")
TEXTS += ("[" * 10_000, "(1," * 300, "'" + "a" * 5000 + "'", "10**10**10", "1j")
KEYS = ("lr", "iterations", "epochs", "gamma", "betas", "mask_fraction", "rule", "param_groups", "slow_freq")
KEYS += ("forget_freq", "fisher_batches", "momentum", "fisher_eps", "no_such_setting", DIGITS)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:16])
def test_text_of_thousands_of_digits(key: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(f"sfron:{key}={text}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200


@pytest.mark.parametrize("text", (DIGITS, f"sfron@{DIGITS}", f"sfron:{DIGITS}", f"{DIGITS}:lr=1"), ids=lambda t: t[:8])
def test_names_of_thousands_of_digits(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("name", ("iterations", "lr", "mask_fraction", "slow_freq", "max_norm"))
def test_python_numbers_that_cannot_be_printed(name: str) -> None:
    with pytest.raises(InputError) as caught:
        SFRon(**{name: 10**5000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("method", (Finetune(epochs=1e308), Finetune(epochs=1e19), Scrub(epochs=2**62)), ids=repr)
def test_more_epochs_than_can_be_counted(method: Method) -> None:
    model, data = make(), batches(2, 4, seed=0)
    with pytest.raises(InputError, match=r"^epochs: .* passes are more iterations than can be counted"):
        Unlearner(model, Classification(), method).run(data, data)
