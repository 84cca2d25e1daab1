"""Membership inference: can an attacker tell that a sample was trained on?

Conventions differ between papers and their values are not comparable, so each attack has its own name here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from .checks import checked_logits
from .logistic import fit_cut

_NEAR = 1e-3  # to ln K, in nats
_AT_ONCE = 1 << 16  # rows: bounds the temporaries


def entropy_mia(retain_logits: Tensor, test_logits: Tensor, forget_logits: Tensor) -> float:
    """Fraction of the forget set that an attacker on the prediction's entropy takes for training data.

    Each sample's feature is H = −Σ_k p_k ln p_k (nats) of its softmax p. A class-balanced logistic regression
    is fitted to tell retain samples (member, 1) from test samples (non-member, 0) and then asked about the
    forget samples. It is scikit-learn's, with its penalty, at the exact optimum
    (:mod:`unlearn_ext.evaluation.logistic`), so that entropies of any size are told apart. Where the mean entropies of
    both sets are equal but for rounding nothing tells members apart, and nobody is taken for one. A retrained model's
    value is the target; neither 0 nor 1 is. Source: SFR-on's protocol (arXiv 2409.19732); SalUn's MIA is another
    attack and reports the fraction of *non*-members.

    Args:
        retain_logits: ``[N_r, K]``, the model's logits on the retained training samples.
        test_logits: ``[N_t, K]``, on test samples; in a class scenario those of the retained classes only.
        forget_logits: ``[N_f, K]``, on the forgotten training samples.

    Returns:
        A fraction in ``[0, 1]``.

    Raises:
        InputError: on empty input, wrong shapes, a different number of classes, or non-finite logits.
    """
    named = {"retain_logits": retain_logits, "test_logits": test_logits, "forget_logits": forget_logits}
    named = {name: checked_logits(logits, name) for name, logits in named.items()}
    classes = named["retain_logits"].shape[1]
    for name, logits in named.items():
        if logits.shape[1] != classes:
            raise InputError(f"{name}: expected {classes} classes as retain_logits has, got {logits.shape[1]}")
    retain, test, forget = _entropies(*named.values())
    return float(fit_cut(retain, test).members(forget).double().mean())


def _entropies(*parts: Tensor) -> list[Tensor]:
    """Of the softmax of each row, in nats: ``[N, K]`` → ``[N]``. Where none is far from ln K they are less that, whose
    digits stand before theirs, and which makes no difference to a regression with an intercept."""
    entropies = [_of_rows(_entropy, part) for part in parts]
    if min(float(part.min()) for part in entropies) > math.log(parts[0].shape[1]) - _NEAR:
        return [_of_rows(_above_uniform, part) for part in parts]
    return entropies


def _of_rows(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """In parts, and of ordered rows, so that the order of the classes makes no difference to the last digit either."""
    return torch.cat([function(rows.sort(dim=1).values) for rows in logits.split(_AT_ONCE)])


def _entropy(rows: Tensor) -> Tensor:
    """With the distances d_k to the row's largest logit and Z = Σ_k exp(−d_k): ln Z + Σ_k d_k exp(−d_k) / Z. No term is
    negative, so that an entropy of 1e-30 has as many digits as one of 1."""
    below = (rows[:, -1:] - rows[:, :-1]).clamp_max(1e4)  # beyond which exp is 0; a difference may overflow
    chances = below.neg().exp()
    rest = chances.sum(dim=1)
    return rest.log1p() + (chances * below).sum(dim=1) / (1.0 + rest)


def _above_uniform(rows: Tensor) -> Tensor:
    """The entropy less ln K: minus the mean of exp(y_k) y_k, y_k = ln (K p_k)."""
    below = rows - rows[:, -1:]
    centred = below - below.mean(dim=1, keepdim=True)
    y = centred - centred.expm1().mean(dim=1, keepdim=True).log1p()
    return -(y.expm1() * y + y).mean(dim=1)
