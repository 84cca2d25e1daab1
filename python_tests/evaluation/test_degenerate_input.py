"""What no measure can be taken of is the project's own error, one sentence that names the argument."""

from __future__ import annotations

import pytest
import torch

from unlearn_ext import InputError
from unlearn_ext.evaluation import (
    Parts,
    accuracy,
    average_gap,
    distance,
    entropy_mia,
    js_divergence,
    kl_divergence,
    knowledge,
)
from unlearn_ext.evaluation.generated import class_scores, frechet_distance, gaussian_distance, pairwise_distance
from unlearn_ext.evaluation.inception import InceptionFID, check_file

NAN, INF = float("nan"), float("inf")
LOGITS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([2, 1])
LOGIT_PARTS, LABEL_PARTS = Parts(LOGITS, LOGITS, LOGITS), Parts(LABELS, LABELS, LABELS)
KEPT = torch.tensor([True, True])
METRICS = {"FA": 0.5, "RA": 1.0, "TA_retained": 1.0, "MIA_entropy": 0.0}
FEATURES = torch.arange(12.0).reshape(6, 2)


def described(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}{value.sum()}" if isinstance(value, torch.Tensor) else repr(value)


def parts(good: Parts, **changes) -> Parts:
    return Parts(**{**vars(good), **changes})


BAD_LOGITS = [
    None,
    3,
    [[0.0, 1.0]],
    torch.zeros(0, 3),
    torch.zeros(2, 0),
    torch.zeros(2, 1),  # one class
    torch.zeros(3),
    torch.zeros(()),
    torch.zeros(2, 3, 1),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.ones(2, 3).to_sparse(),
    LOGITS * NAN,
    LOGITS * INF,
]


@pytest.mark.parametrize("bad", BAD_LOGITS, ids=described)
def test_logits(bad) -> None:
    for name, call in {
        "logits": lambda: accuracy(bad, LABELS),
        "retrained_logits": lambda: kl_divergence(bad, LOGITS),
        "unlearned_logits": lambda: js_divergence(LOGITS, bad),
        "retain_logits": lambda: entropy_mia(bad, LOGITS, LOGITS),
        "forget_logits": lambda: entropy_mia(LOGITS, LOGITS, bad),
        r"logits\.retain": lambda: knowledge(parts(LOGIT_PARTS, retain=bad), LABEL_PARTS, KEPT),
        r"logits\.test": lambda: knowledge(parts(LOGIT_PARTS, test=bad), LABEL_PARTS, KEPT),
        "unlearned_logits ": lambda: distance(METRICS, bad, METRICS, LOGITS),
    }.items():
        with pytest.raises(InputError, match=rf"^{name.strip()}: expected [^\n]*$"):
            call()


@pytest.mark.parametrize(
    "bad",
    [None, [2, 1], torch.tensor(2), LABELS[:1], LABELS[:0], LABELS + 0.5, LABELS + 1, LABELS - 3],
    ids=described,
)
def test_labels(bad) -> None:
    for name, call in {
        "labels": lambda: accuracy(LOGITS, bad),
        r"labels\.forget": lambda: knowledge(LOGIT_PARTS, parts(LABEL_PARTS, forget=bad), KEPT),
        "labels ": lambda: class_scores(LOGITS.softmax(1), bad),
    }.items():
        with pytest.raises(InputError, match=rf"^{name.strip()}: expected [^\n]*$"):
            call()


@pytest.mark.parametrize(
    "kept", [None, [True, True], LABELS, KEPT[:1], KEPT[None], torch.tensor([False, False])], ids=described
)
def test_which_test_samples_are_kept(kept) -> None:
    with pytest.raises(InputError, match=r"^kept: [^\n]*$"):
        knowledge(LOGIT_PARTS, LABEL_PARTS, kept)


def test_parts_have_to_be_parts() -> None:
    with pytest.raises(InputError, match=r"^logits: expected Parts"):
        knowledge((LOGITS, LOGITS, LOGITS), LABEL_PARTS, KEPT)
    with pytest.raises(InputError, match=r"^labels: expected Parts"):
        knowledge(LOGIT_PARTS, {"forget": LABELS}, KEPT)


@pytest.mark.parametrize("value", [None, NAN, INF, "0.5", "much", 1j, torch.zeros(2), [0.5]], ids=described)
def test_metrics(value) -> None:
    bad = {**METRICS, "RA": value}
    for call in (
        lambda: average_gap(METRICS, bad, keys=("FA", "RA")),
        lambda: average_gap(bad, METRICS, keys=("FA", "RA")),
        lambda: distance(bad, LOGITS, METRICS, LOGITS),
    ):
        with pytest.raises(InputError, match=r"^(metrics|reference): expected [^\n]*'RA'"):
            call()


def test_metrics_that_are_none() -> None:
    with pytest.raises(InputError, match=r"^metrics: expected a dict of metrics, got None"):
        average_gap(None, METRICS, keys=("FA",))
    for keys in ("FA", None, 3):
        with pytest.raises(InputError, match=r"^keys: expected a list of metrics"):
            average_gap(METRICS, METRICS, keys=keys)
    with pytest.raises(InputError, match=r"^keys: expected at least one"):
        average_gap(METRICS, METRICS, keys=[])
    assert average_gap({"FA": torch.tensor(0.5)}, {"FA": 1}, keys=["FA"]) == 0.5


@pytest.mark.parametrize(
    "bad",
    [None, [[1.0]], torch.zeros(()), torch.zeros(0, 2), torch.zeros(3, 0), FEATURES[:1], FEATURES * NAN, FEATURES * 1j],
    ids=described,
)
def test_features(bad) -> None:
    for name, call in {
        "real": lambda: frechet_distance(bad, FEATURES),
        "generated": lambda: frechet_distance(FEATURES, bad),
        "real ": lambda: gaussian_distance(bad, FEATURES),
        "generated ": lambda: gaussian_distance(FEATURES, bad),
        "samples": lambda: pairwise_distance(bad),
    }.items():
        with pytest.raises(InputError, match=rf"^{name.strip()}: [^\n]*$"):
            call()


def test_features_of_other_kinds() -> None:
    with pytest.raises(InputError, match=r"^real: expected a tensor of shape \[N, features\], got .*\[6\]"):
        frechet_distance(FEATURES[:, 0], FEATURES)
    with pytest.raises(InputError, match=r"^generated: expected features of shape \[N, 2\]"):
        gaussian_distance(FEATURES, torch.rand(6, 3))
    with pytest.raises(InputError, match=r"^samples: expected a tensor of shape \[N, \.\.\.\]"):
        pairwise_distance(torch.zeros(4))


@pytest.mark.parametrize("bad", [None, [[1.0]], torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 0)], ids=described)
def test_probabilities(bad) -> None:
    with pytest.raises(InputError, match=r"^probabilities: expected [^\n]*$"):
        class_scores(bad, LABELS)


@pytest.mark.parametrize(
    "pictures",
    [
        None,
        torch.zeros(4),
        torch.zeros(2, 2, 8, 8),
        torch.zeros(2, 3, 0, 8),
        torch.zeros(2, 3, 8, 8).byte(),
        torch.full((2, 1, 8, 8), NAN),
    ],
    ids=["none", "flat", "two channels", "no pixels", "bytes", "nan"],
)
def test_pictures(pictures, tmp_path) -> None:
    fid = InceptionFID.__new__(InceptionFID)  # what is refused is refused before the network is asked
    fid._real = [torch.zeros(3, 64)]
    with pytest.raises(InputError, match=r"^real: [^\n]*$"):
        fid.add_real(pictures)
    with pytest.raises(InputError, match=r"^(generated: |FID needs at least 2 generated)[^\n]*$"):
        fid.distance(pictures)
    with pytest.raises(InputError, match="there are none at"):
        check_file(str(tmp_path / "inception.pth"))
    with pytest.raises(InputError, match=r"^weights: expected the path of"):
        InceptionFID(None)


@pytest.mark.parametrize("keys", [[[]], [None], [1]])
def test_keys_of_a_gap(keys) -> None:
    with pytest.raises(InputError, match="keys: expected a list of metrics"):
        average_gap({"FA": 1.0}, {"FA": 1.0}, keys=keys)


def test_features_of_inception_that_are_no_number() -> None:
    with pytest.raises(InputError, match="features: expected 64, 192, 768 or 2048, got a torch"):
        InceptionFID("x", torch.zeros(3))
