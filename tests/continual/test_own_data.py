"""A user's own data: what is whole becomes a stream, what is not is named."""

import pytest
import torch

from growmoe.continual.own_data import from_avalanche, from_datasets
from growmoe.continual.streams import load


def part(labels, shape=(1, 3, 3), value=0.5):
    return torch.full((len(labels), *shape), value), torch.tensor(labels)


def test_lists_of_data_sets_become_experiences_even_with_one_class_or_one_example():
    sets = [part([0, 1, 0]), part([2]), part([3, 3])]
    made = from_datasets("mine", sets, sets, num_classes=4)
    assert made.experience_classes == ((0, 1), (2,), (3,)) and made.num_classes == 4
    for index, (_, labels) in zip(made.train_index, sets, strict=True):
        assert sorted(made.data.train_labels[index].tolist()) == sorted(labels.tolist())


def test_classes_that_return_are_counted_once():
    sets = [part([0, 1]), part([1, 2])]
    assert from_datasets("mine", sets, sets, num_classes=3).num_classes == 3


def test_torch_datasets_are_read_example_by_example():
    dataset = torch.utils.data.TensorDataset(*part([0, 1, 1]))
    made = from_datasets("mine", [dataset], [dataset], 2, scenario="domain")
    assert made.train_images().mean() == 0.5 and made.num_classes == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (part([2, 4]), "train data set 1, example 1: label 4, expected 0 to 3"),
        (part([2, -1]), "label -1, expected 0 to 3"),
        (part([2], value=float("nan")), "train data set 1, example 0: the image holds NaN"),
        (part([2], value=float("inf")), "NaN or infinity"),
        (part([2], shape=(1, 4, 4)), r"change from \(1, 3, 3\).*\(1, 4, 4\).*train data set 1"),
        (part([2], shape=(3,)), "must be .N, C, H, W."),
        ((torch.zeros(2, 1, 3, 3), torch.tensor([2])), "2 images and 1 labels"),
        ((torch.zeros(0, 1, 3, 3), torch.zeros(0).long()), "0 images and 0 labels"),
        ((torch.zeros(1, 1, 3, 3), torch.tensor([0.5])), "labels must be integers"),
    ],
)
def test_bad_data_is_named_by_set_and_example(second, message):
    good = part([0, 1])
    with pytest.raises(ValueError, match=message):
        from_datasets("mine", [good, second], [good, good], num_classes=4)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_an_avalanche_benchmark_comes_back_as_the_stream_it_was(scenario):
    stream = load(f"split-digits:scenario={scenario},examples=20,tests=5", 0)
    made = from_avalanche("mine", stream.benchmark())
    assert made.scenario == scenario and made.num_classes == 10
    for mine, its in zip(made.experience_classes, stream.experience_classes, strict=True):
        assert set(mine) == set(its)
    assert made.train_images(made.train_index[0]).sum() == pytest.approx(
        stream.train_images(stream.train_index[0]).sum().item()
    )
