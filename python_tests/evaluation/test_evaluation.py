import math

import pytest
import torch
from torch import nn

from unlearn_ext.errors import InputError
from unlearn_ext.evaluation import (
    Parts,
    accuracy,
    average_gap,
    distance,
    entropy_mia,
    js_divergence,
    kl_divergence,
    knowledge,
    predict,
)


def logits_of(*rows):
    """Logits whose softmax is exactly the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.head(x)))


class Output:
    def __init__(self, logits):
        self.logits = logits


# ------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_counts_the_largest_logit():
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0], [5.0, 4.0, 6.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 1])) == 0.5
    assert accuracy(logits, torch.tensor([1, 0, 2, 2], dtype=torch.int32)) == 1.0
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1])) == 0.5  # a tie goes to the first class


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_accepted(dtype):
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]], dtype=dtype)
    assert accuracy(logits, torch.tensor([1, 1])) == 0.5
    assert kl_divergence(logits, logits) == 0.0


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([0, 3]), r"values in \[0, 3\), got values from 0 to 3"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([0]), "expected 2 entries"),
        (torch.tensor([[0], [1]]), "1-d"),
        (torch.tensor([0.0, 1.0]), "integer"),
        ([0, 1], "got a list"),
    ],
)
def test_accuracy_refuses_bad_labels(labels, match):
    with pytest.raises(ValueError, match=match):
        accuracy(torch.zeros(2, 3), labels)


BAD_LOGITS = [
    (torch.zeros(0, 3), "at least one sample"),
    (torch.zeros(3, 1), "two classes"),
    (torch.zeros(3), r"\[samples, classes\]"),
    (torch.zeros(1, 2, 3), r"\[samples, classes\]"),
    (torch.zeros(2, 3, dtype=torch.int64), "floating-point"),
    (torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), "1 rows with inf or NaN, the first at index 1"),
    (torch.tensor([[0.0, float("inf")], [0.0, 1.0]]), "first at index 0"),
    ("logits", "got 'logits'"),
]


@pytest.mark.parametrize(("bad", "match"), BAD_LOGITS)
def test_bad_logits_are_refused_by_every_metric_and_named(bad, match):
    good = torch.zeros(2, 3)
    calls = [
        ("logits", lambda: accuracy(bad, torch.tensor([0, 0]))),
        ("retrained_logits", lambda: kl_divergence(bad, good)),
        ("unlearned_logits", lambda: js_divergence(good, bad)),
        ("retain_logits", lambda: entropy_mia(bad, good, good)),
        ("test_logits", lambda: entropy_mia(good, bad, good)),
        ("forget_logits", lambda: entropy_mia(good, good, bad)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name}: .*{match}"):
            call()


# ---------------------------------------------------------------------------------------------- divergences


def test_divergences_by_hand():
    p, q = logits_of([0.5, 0.5], [1.0 / 4, 3.0 / 4]), logits_of([0.25, 0.75], [1.0 / 4, 3.0 / 4])
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # of the first sample; the second has 0
    assert kl_divergence(p, q) == pytest.approx(kl / 2, abs=1e-15)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert kl_divergence(q, p) == pytest.approx(reverse / 2, abs=1e-15)
    m = (3 / 8, 5 / 8)
    js = 0.5 * (
        0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
        + 0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])
    )  # fmt: skip
    assert js_divergence(p, q) == pytest.approx(js / 2, abs=1e-15)
    assert js_divergence(q, p) == pytest.approx(js / 2, abs=1e-15)


def test_divergences_do_not_see_a_shift_of_the_logits():
    p, q = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert kl_divergence(p + 3, q - 100) == pytest.approx(kl_divergence(p, q), abs=1e-12)
    assert kl_divergence(p, p + 1) == pytest.approx(0.0, abs=1e-15)
    assert kl_divergence(p, p + 1) >= 0


def test_divergences_stay_finite_on_certain_predictions():
    p, q = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert kl_divergence(p, q) == pytest.approx(1000.0)  # in float32 arithmetic p ln p would be 0 · −inf
    assert js_divergence(p, q) == pytest.approx(math.log(2))
    largest = torch.tensor([[1e308, -1e308]], dtype=torch.float64)  # the difference overflows to inf
    assert kl_divergence(largest, largest) == 0.0
    assert js_divergence(largest, largest) == 0.0


def test_divergences_need_equal_shapes():
    with pytest.raises(ValueError, match=r"unlearned_logits: expected shape \[2, 3\].*got \[3, 3\]"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(3, 3))


# ---------------------------------------------------------------------------------------------- average gap


def test_average_gap_by_hand():
    model = {"FA": 0.9, "RA": 1.0, "TA": 0.95, "MIA_entropy": 0.8, "KL": 123.0}
    retrained = {"FA": 0.95, "RA": 0.99, "TA": 0.96, "MIA_entropy": 0.7}
    assert average_gap(model, retrained) == pytest.approx((0.05 + 0.01 + 0.01 + 0.1) / 4)
    assert average_gap(retrained, model) == average_gap(model, retrained)
    assert average_gap(model, retrained, keys=("FA",)) == pytest.approx(0.05)
    assert average_gap(model, model) == 0.0


def test_average_gap_refuses_what_it_cannot_average():
    model = {"FA": 0.9, "RA": 1.0, "TA": 0.95, "MIA_entropy": float("nan")}
    with pytest.raises(ValueError, match="metrics: expected 'MIA_entropy' to be a finite number, got nan"):
        average_gap(model, model)
    with pytest.raises(ValueError, match="reference: expected the metric 'RA'"):
        average_gap(model, {"FA": 0.9}, keys=("FA", "RA"))
    with pytest.raises(ValueError, match="metrics: expected 'FA' to be a finite number, got None"):
        average_gap({"FA": None}, model, keys=("FA",))
    with pytest.raises(ValueError, match="at least one metric"):
        average_gap(model, model, keys=())


# ------------------------------------------------------------------------------------- membership inference


def test_entropy_mia_finds_members_by_their_certainty():
    certain, unsure = logits_of([0.98, 0.02]), logits_of([0.5, 0.5])
    retain, test = certain.repeat(300, 1), unsure.repeat(30, 1)  # unbalanced on purpose
    assert entropy_mia(retain, test, certain.repeat(5, 1)) == 1.0
    assert entropy_mia(retain, test, unsure.repeat(5, 1)) == 0.0
    assert entropy_mia(retain, test, torch.cat([certain, unsure.repeat(3, 1)])) == 0.25


def test_entropy_mia_cuts_where_a_balanced_attacker_would():
    """With equal spread and balanced weights the boundary is the midpoint of the two means, for any sizes."""

    def with_entropy(target):  # bisection: the two-class distribution of this entropy
        low, high = 0.5, 1.0 - 1e-12
        for _ in range(100):
            p = (low + high) / 2
            h = -p * math.log(p) - (1 - p) * math.log(1 - p)
            low, high = (p, high) if h > target else (low, p)
        return [p, 1 - p]

    retain = logits_of(with_entropy(0.1), with_entropy(0.3)).repeat(500, 1)
    test = logits_of(with_entropy(0.4), with_entropy(0.6)).repeat(50, 1)
    grid = [0.3, 0.33, 0.37, 0.4]  # the midpoint is 0.35
    forget = logits_of(*(with_entropy(h) for h in grid))
    assert [entropy_mia(retain, test, row[None]) for row in forget] == [1.0, 1.0, 0.0, 0.0]


def test_entropy_mia_needs_equal_class_counts():
    with pytest.raises(ValueError, match="test_logits: expected 3 classes as retain_logits has, got 4"):
        entropy_mia(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3))


# -------------------------------------------------------------------------------------------------- predict


def test_predict_uses_eval_mode_and_restores_every_flag():
    model = Linear().train()
    model.norm.eval()  # frozen batch normalisation inside a model in train mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])

    logits, labels = predict(model, zip(x.split(2), y.split(2), strict=True))

    assert (model.training, model.head.training, model.norm.training, model.drop.training) == (
        True,
        True,
        False,
        True,
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(logits, model(x).detach())
    assert torch.equal(labels, y) and not logits.requires_grad


def test_predict_restores_flags_after_an_error():
    model = Linear().train()
    with pytest.raises(ValueError, match="pixel_values"):
        predict(model, [torch.zeros(2, 2)])
    assert all(module.training for module in model.modules())


def test_predict_takes_dicts_and_outputs_with_logits():
    class Wrapped(nn.Module):
        def forward(self, pixel_values):
            return Output(pixel_values.double() * 2)

    batches = [{"pixel_values": torch.ones(2, 3), "labels": torch.tensor([0, 1], dtype=torch.int32)}]
    logits, labels = predict(Wrapped(), batches)
    assert logits.dtype == torch.float32 and torch.equal(logits, torch.full((2, 3), 2.0))
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 1]


def test_predict_refuses_empty_batches_and_odd_outputs():
    with pytest.raises(ValueError, match="at least one batch"):
        predict(Linear(), [])
    with pytest.raises(ValueError, match=r"expected logits of shape \[4, classes\].*got a .*\[8\]"):
        predict(nn.Flatten(0), [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))])


@pytest.mark.parametrize("batches", [None, 3, object()])
def test_predict_refuses_what_is_no_iterable(batches):
    with pytest.raises(InputError, match=r"the evaluated set is no iterable of batches but .*: pass a DataLoader"):
        predict(Linear(), batches)


def test_predict_follows_autocast_and_sees_the_weights_as_they_are():
    """Half copies of weights live as long as the autocast, and a step between two calls makes them stale."""
    model, x = Linear().eval(), torch.randn(4, 2)
    batches = [(x, torch.zeros(4, dtype=torch.int64))]
    plain = predict(model, batches)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = predict(model, batches)[0]
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.zero_()
        assert not predict(model, batches)[0].any()
    assert half.dtype == torch.float32 and torch.equal(half, half.bfloat16().float()) and not torch.equal(half, plain)


# ------------------------------------------------------------------------------------------------- the verdict


def test_knowledge_and_distance_by_hand():
    """Two classes, of which class 1 is forgotten: its test sample counts in TA alone."""
    sure, unsure, wrong = (0.9, 0.1), (0.5, 0.5), (0.2, 0.8)
    retain = logits_of(sure, sure, sure, wrong)
    test = logits_of(unsure, sure, unsure)
    labels = Parts(torch.tensor([1, 1]), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0]))
    kept = torch.tensor([True, False, True])
    known = knowledge(Parts(logits_of(wrong, sure), retain, test), labels, kept)
    assert {key: known[key] for key in ("FA", "UA", "RA", "TA", "TA_retained")} == pytest.approx(
        {"FA": 0.5, "UA": 0.5, "RA": 0.75, "TA": 2 / 3, "TA_retained": 1.0}
    )
    assert known["MIA_entropy"] == entropy_mia(retain, test[kept], logits_of(wrong, sure)) == 1.0
    retrained = {"FA": 0.0, "RA": 1.0, "TA": 0.1, "TA_retained": 0.9, "MIA_entropy": 0.6}
    found = distance(known, logits_of(wrong, sure), retrained, logits_of(sure, sure))
    assert found["gap"] == pytest.approx((0.5 + 0.25 + 0.1 + 0.4) / 4)
    assert found["KL"] == pytest.approx((0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)) / 2)
    assert found["JS"] == pytest.approx(js_divergence(logits_of(sure, sure), logits_of(wrong, sure)))
