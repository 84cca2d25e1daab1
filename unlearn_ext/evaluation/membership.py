"""Membership inference: can an attacker tell that a sample was trained on?

Conventions differ between papers and their values are not comparable, so each attack has its own name here.
"""

import torch
from torch import Tensor

from ..errors import InputError
from .metrics import checked_logits


def entropy_mia(retain_logits: Tensor, test_logits: Tensor, forget_logits: Tensor) -> float:
    """Fraction of the forget set that an attacker on the prediction's entropy takes for training data.

    Each sample's feature is H = −Σ_k p_k ln p_k (nats) of its softmax p. A class-balanced logistic regression
    is fitted to tell retain samples (member, 1) from test samples (non-member, 0) and then asked about the
    forget samples. A retrained model's value is the target; neither 0 nor 1 is. Source: SFR-on's protocol
    (arXiv 2409.19732); SalUn's MIA is another attack and reports the fraction of *non*-members.

    Args:
        retain_logits: ``[N_r, K]``, the model's logits on the retained training samples.
        test_logits: ``[N_t, K]``, on test samples; in a class scenario those of the retained classes only.
        forget_logits: ``[N_f, K]``, on the forgotten training samples.

    Returns:
        A fraction in ``[0, 1]``.

    Raises:
        InputError: on empty input, wrong shapes, a different number of classes, or non-finite logits.
        ImportError: when scikit-learn is not installed.
    """
    named = {"retain_logits": retain_logits, "test_logits": test_logits, "forget_logits": forget_logits}
    named = {name: checked_logits(logits, name) for name, logits in named.items()}
    classes = named["retain_logits"].shape[1]
    for name, logits in named.items():
        if logits.shape[1] != classes:
            raise InputError(f"{name}: expected {classes} classes as retain_logits has, got {logits.shape[1]}")
    retain, test, forget = (_entropy(logits) for logits in named.values())
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            'entropy_mia needs scikit-learn, which is not installed: pip install "unlearn_ext[demo]"'
        ) from error

    features = torch.cat([retain, test]).unsqueeze(1).numpy()
    member = [1] * len(retain) + [0] * len(test)
    attack = LogisticRegression(class_weight="balanced").fit(features, member)
    return float(attack.predict(forget.unsqueeze(1).numpy()).mean())


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in nats: ``[N, K]`` → ``[N]``."""
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
