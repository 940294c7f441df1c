import pytest
import torch

from growmoe.continual import GrowingClassifier, RandomPatchFeatures, default_rules
from growmoe.continual.ridge import RidgeClassifier
from growmoe.continual.streams import load
from growmoe.rules import FreezeSettled, MergeOverlapping, SplitOnNovelty


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


def test_every_label_gets_an_expert_when_it_first_appears(digits):
    model = GrowingClassifier(features(), 10, early=64)
    for images, labels in batches(digits):
        for event in model.learn(images, labels):
            if event.act == "spawn":
                assert event.reason == f"label {int(event.signals['label'])} has no expert"
    assert sorted(int(e.body.label) for e in model.layer.experts.values()) == list(range(10))
    assert model.layer.lineage.replay() == list(model.layer.experts)


def test_a_new_domain_under_old_labels_gets_experts_and_a_return_gets_none():
    g = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(2, 3, 6, generator=g)  # two domains, three labels

    class Given:
        num_features, memory_bytes = 6, 0

        def fit(self, images, generator):
            return self

        def __call__(self, images):
            return images

    model = GrowingClassifier(Given(), 3, early=30, every=4)

    def learn(domain, count):
        for _ in range(count):
            y = torch.randint(3, (30,), generator=g)
            model.learn(centre[domain, y] + 0.5 * torch.randn(30, 6, generator=g), y)
        return len(model.layer.experts)

    assert learn(0, 150) == 3
    assert learn(1, 150) == 6
    assert learn(0, 100) == 6
    for domain in (0, 1):
        y = torch.arange(3).repeat(100)
        x = centre[domain, y] + 0.5 * torch.randn(300, 6, generator=g)
        assert (model(x).argmax(1) == y).float().mean() > 0.95


def test_a_stationary_stream_splits_nothing():
    for seed in range(3):
        stream = load("split-digits", seed=seed)
        model = GrowingClassifier(features(), 10)
        for _ in range(4):  # long enough for every expert to be judged
            for images, labels in batches(stream, 32):
                model.learn(images, labels)
        births = [e for e in model.layer.lineage if e.act == "spawn" and e.parents]
        assert not births


def test_settled_experts_freeze_and_say_why(digits):
    model = GrowingClassifier(features(), 10, rules=[FreezeSettled(rows_per_feature=1.0)])
    for images, labels in batches(digits):
        model.learn(images, labels)
    frozen = [e for e in model.layer.lineage if e.act == "freeze"]
    assert frozen and all("rows per feature" in e.reason for e in frozen)


def test_bad_input_is_refused_before_anything_is_learned(digits):
    model = GrowingClassifier(features(), 10, early=64)
    images, labels = next(batches(digits))
    model.learn(images, labels)
    counts = {id: e.body.count for id, e in model.layer.experts.items()}
    for x, y, message in (
        (images, labels + 10, r"labels must be in \[0, 10\)"),
        (images, labels - 10, r"labels must be in \[0, 10\)"),
        (images[:3], labels, "3 images, but 64 labels"),
        (torch.full_like(images, torch.nan), labels, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            model.learn(x, y)
    assert {id: e.body.count for id, e in model.layer.experts.items()} == counts
    assert model.learn(images[:0], labels[:0]) == []
    with pytest.raises(RuntimeError, match="nothing was learned"):
        GrowingClassifier(features(), 10)(images)


def test_one_image_one_class_and_a_batch_of_one_are_learned(digits):
    images, labels = next(batches(digits))
    model = GrowingClassifier(features(), 10)
    model.learn(images[:1], labels[:1])
    model.finish()
    assert model(images).argmax(1).unique().tolist() == [int(labels[0])]


def test_default_rules_split_merge_and_freeze():
    kinds = {type(rule) for rule in default_rules()}
    assert {SplitOnNovelty, MergeOverlapping, FreezeSettled} <= kinds
