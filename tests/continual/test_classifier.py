import pytest
import torch

from growmoe.continual import (
    GrowingClassifier,
    RandomPatchFeatures,
    default_features,
)
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.streams import load
from growmoe.rules import FreezeSettled, MergeOverlapping


@pytest.fixture(scope="module")
def digits():
    return load("split-digits", seed=0)


def batches(stream, size=64):
    g = torch.Generator().manual_seed(0)
    for index in stream.train_index:
        index = torch.as_tensor(index)
        for part in index[torch.randperm(len(index), generator=g)].split(size):
            yield stream.train_images(part), stream.data.train_labels[part]


def features():
    return RandomPatchFeatures.for_images(8, 8)


def accuracy(model, stream):
    index = torch.cat([torch.as_tensor(i) for i in stream.test_index])
    predicted = model(stream.test_images(index)).argmax(1)
    return float((predicted == stream.data.test_labels[index]).float().mean())


def test_it_learns_digits_in_one_pass_without_forgetting_better_than_one_head(digits):
    grown = GrowingClassifier(features(), 10)
    head = RidgeClassifier(features(), 10, ridge=1e-4)
    for images, labels in batches(digits):
        grown.learn(images, labels)
        head.learn(images, labels)
    grown.finish(), head.finish()
    assert torch.equal(grown.features._filter_QF, head.features._filter_QF)  # the very features
    assert accuracy(grown, digits) > 0.96
    assert accuracy(grown, digits) > accuracy(head, digits) + 0.01


def label_experts(model):
    return [e for d in model.domains.values() if d.layer for e in d.layer.experts.values()]


def test_every_label_gets_an_expert_when_it_first_appears(digits):
    model = GrowingClassifier(features(), 10, early=64)
    for images, labels in batches(digits):
        for event in model.learn(images, labels):
            if event.act == "spawn":
                assert event.reason == f"label {int(event.signals['label'])} has no expert"
    assert sorted(int(e.body.label) for e in label_experts(model)) == list(range(10))
    assert list(model.domains) == [0]
    for layer in (model.layer, model.domains[0].layer):
        assert layer.lineage.replay() == list(layer.experts)


class Given:
    """Features that are the inputs."""

    memory_bytes = 0

    def __init__(self, width):
        self.num_features, self.blocks = width, (width,)

    def fit(self, images, generator):
        return self

    def __call__(self, images):
        return images


class Moving:
    """Three labels whose centres lie elsewhere in every domain."""

    def __init__(self, domains=3, width=8):
        self.g = torch.Generator().manual_seed(0)
        self.centre = 3 * torch.randn(domains, 3, width, generator=self.g)
        self.width = width

    def draw(self, domain, count=32):
        """Inputs and labels, of one domain or of one for each input."""
        y = torch.randint(3, (count,), generator=self.g)
        noise = 0.5 * torch.randn(count, self.width, generator=self.g)
        return self.centre[domain, y] + noise, y

    def accuracy(self, model, domain):
        x, y = self.draw(domain, 400)
        return float((model(x).argmax(1) == y).float().mean())


def births(model):
    return [e for e in model.lineage if e.layer == "domains" and e.act == "spawn" and e.accepted]


@pytest.mark.slow
def test_a_new_domain_is_found_soon_and_a_return_is_recognised():
    moving = Moving()
    model = GrowingClassifier(Given(8), 3, early=100)
    delays, batch = [], 0
    for domain in (0, 1, 2, 0, 1, 2):
        for since in range(30):
            before = len(births(model))
            # the boundary falls inside a batch
            mixed = torch.full((32,), domain)
            if since == 0 and domain != 0:
                mixed[:10] = domain - 1
            model.learn(*moving.draw(mixed))
            if len(births(model)) > before:
                delays.append(since)
            batch += 1
    assert len(births(model)) == 2 and max(delays) <= 3
    assert "novel inputs" in births(model)[0].reason
    assert list(model.domains) == [0, 1, 2]
    assert all(moving.accuracy(model, domain) > 0.95 for domain in range(3))


@pytest.mark.slow
def test_a_fuzzy_change_gives_one_birth():
    moving = Moving(2)
    model = GrowingClassifier(Given(8), 3, early=100)
    for step in range(90):
        share = min(max((step - 30) / 30, 0.0), 1.0)
        domain = (torch.rand(32, generator=moving.g) < share).long()
        model.learn(*moving.draw(domain))
    assert len(births(model)) == 1
    assert all(moving.accuracy(model, domain) > 0.95 for domain in range(2))


@pytest.mark.slow
def test_a_stationary_stream_makes_no_domain(digits):
    for seed in range(2):
        model = GrowingClassifier(default_features((1, 8, 8)), 10, early=256, seed=seed)
        stream = load("split-digits", seed=seed)
        every = torch.cat([torch.as_tensor(i) for i in stream.train_index])
        g = torch.Generator().manual_seed(seed)
        for _ in range(2):
            for part in every[torch.randperm(len(every), generator=g)].split(32):
                model.learn(stream.train_images(part), stream.data.train_labels[part])
        assert not births(model) and len(label_experts(model)) == 10


def test_what_waited_is_taken_back_and_given_to_the_newborn():
    moving = Moving(2)
    model = GrowingClassifier(Given(8), 3, early=100, label_rules=[])
    seen = 0
    while not births(model):
        x, y = moving.draw(int(seen >= 40 * 32))
        model.learn(x, y)
        seen += len(y)
        assert seen < 60 * 32
    rows = {id: float(d.count_C.sum()) for id, d in model.domains.items()}
    assert sum(rows.values()) == seen
    for d in model.domains.values():
        assert float(sum(sums[:, -1].sum() for sums in d.totals()[1][:1])) == float(d.count_C.sum())
    new = seen - 40 * 32
    assert 0.8 * new <= rows[1] <= new + 30
    assert 0 < model.memory().examples <= 4 * 32 * 4 * (16 + 8)


@pytest.mark.slow
def test_domains_without_rules_are_those_it_is_told_of():
    moving = Moving(2)
    model = GrowingClassifier(Given(8), 3, early=100, rules=[])
    for domain in (None, 0):
        for _ in range(40):
            model.learn(*moving.draw(0))
        if domain is None:
            second = model.enter(None)
            for _ in range(40):
                model.learn(*moving.draw(1))
            assert model.enter(0) == 0
    assert second == 1 and list(model.domains) == [0, 1]
    assert float(model.domains[1].count_C.sum()) == 40 * 32
    assert all(moving.accuracy(model, domain) > 0.95 for domain in range(2))
    with pytest.raises(KeyError, match="no domain 7"):
        model.enter(7)
    fixed = GrowingClassifier(Given(8), 3, early=100, rules=[], num_domains=3)
    for _ in range(30):
        fixed.learn(*moving.draw(0))
    assert list(fixed.domains) == [0, 1, 2] and not births(fixed)


@pytest.mark.slow
def test_a_domain_that_was_made_twice_is_merged_into_one():
    moving = Moving(1)
    model = GrowingClassifier(Given(8), 3, early=100, rules=[MergeOverlapping()])
    for _ in range(60):
        model.learn(*moving.draw(0))
    model.enter(None)  # nothing has changed
    for _ in range(60):
        model.learn(*moving.draw(0))
    merged = [e for e in model.lineage if e.act == "merge" and e.accepted]
    assert len(merged) == 1 and merged[0].change <= 0.1
    (domain,) = model.domains.values()
    assert float(domain.count_C.sum()) == 120 * 32
    assert moving.accuracy(model, 0) > 0.95


@pytest.mark.slow
def test_settled_experts_freeze_and_say_why(digits):
    model = GrowingClassifier(features(), 10, label_rules=[FreezeSettled(rows_per_feature=1.0)])
    for images, labels in batches(digits):
        model.learn(images, labels)
    frozen = [e for e in model.lineage if e.act == "freeze"]
    assert frozen and all("rows per feature" in e.reason for e in frozen)


def test_bad_input_is_refused_before_anything_is_learned(digits):
    model = GrowingClassifier(features(), 10, early=64)
    images, labels = next(batches(digits))
    model.learn(images, labels)
    counts = [e.body.count for e in label_experts(model)]
    for x, y, message in (
        (images, labels + 10, r"labels must be in \[0, 10\)"),
        (images, labels - 10, r"labels must be in \[0, 10\)"),
        (images[:3], labels, "3 images, but 64 labels"),
        (torch.full_like(images, torch.nan), labels, "NaN"),
        (torch.full_like(images, torch.inf), labels, "infinite"),
        (images[:, :, :4], labels, r"images were \(1, 8, 8\), are \(1, 4, 8\)"),
        (images, labels.float(), "tensor of integers"),
        (images.int(), labels, "float tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            model.learn(x, y)
    assert [e.body.count for e in label_experts(model)] == counts
    for x in (images[:, :, :4], torch.full_like(images, torch.nan)):
        with pytest.raises(ValueError, match="images"):
            model(x)
    assert model.learn(images[:0], labels[:0]) == []
    with pytest.raises(RuntimeError, match="nothing was learned"):
        GrowingClassifier(features(), 10)(images)


def test_one_image_one_class_and_a_batch_of_one_are_learned(digits):
    images, labels = next(batches(digits))
    model = GrowingClassifier(features(), 10)
    model.learn(images[:1], labels[:1])
    model.finish()
    assert model(images).argmax(1).unique().tolist() == [int(labels[0])]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16), (1, 1, 9), (5,)])
def test_default_features_fit_any_shape(shape):
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))
    found = default_features(shape).fit(x, torch.Generator().manual_seed(0))
    y = found(x)
    assert y.shape == (40, found.num_features) and y.isfinite().all()
    assert sum(found.blocks) == found.num_features and found.memory_bytes > 0


@pytest.mark.slow
def test_a_saved_classifier_goes_on_as_it_was(tmp_path):
    moving = Moving(2)
    model = GrowingClassifier(Given(8), 3, early=100)
    for domain in (0, 1):
        for _ in range(60):
            model.learn(*moving.draw(domain))
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    x, y = moving.draw(0)
    torch.testing.assert_close(other(x), model(x))
    model.learn(x, y), other.learn(x, y)
    torch.testing.assert_close(other(x), model(x))
