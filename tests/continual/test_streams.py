"""Streams: every image once, classes apart, damaged files named."""

import gzip
import struct

import numpy as np
import pytest
import torch

from growmoe.continual.data import idx, mnist
from growmoe.continual.streams import Data, DataError, class_incremental, load

NAMES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 40),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 20),
)


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_folder(folder, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for images, labels, count in NAMES:
        parts = {images: rng.integers(0, 256, (count, 28, 28)), labels: np.arange(count) % 10}
        for name, array in parts.items():
            raw = idx_bytes(array)
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist, "DEBIAN_FASHION_MNIST", tmp_path / "absent")


@pytest.fixture(scope="module")
def digits():
    return load("split-digits", seed=3)


def test_every_image_is_in_exactly_one_experience(digits):
    for index, labels in (
        (digits.train_index, digits.data.train_labels),
        (digits.test_index, digits.data.test_labels),
    ):
        assert torch.cat(index).sort().values.tolist() == list(range(len(labels)))
        for part, classes in zip(index, digits.experience_classes, strict=True):
            assert set(labels[part].tolist()) == set(classes)


def test_experiences_follow_the_class_order_two_by_two(digits):
    assert sum(digits.experience_classes, ()) == digits.class_order
    assert [len(classes) for classes in digits.experience_classes] == [2] * 5


def test_images_are_floats_from_0_to_1(digits):
    images = digits.train_images(digits.train_index[0])
    assert images.dtype == torch.float32 and images.shape[1:] == (1, 8, 8)
    assert images.min() == 0 and images.max() == 1


def test_digits_are_split_stratified_and_without_overlap(digits):
    train, test = digits.data.train_labels.bincount(), digits.data.test_labels.bincount()
    assert len(digits.data.train_labels) + len(digits.data.test_labels) == 1797
    assert ((test / (train + test) - 0.25).abs() < 0.01).all()


def test_the_seed_decides_the_class_order_and_nothing_else(digits):
    again, other = load("split-digits", 3), load("split-digits", 4)
    assert again.class_order == digits.class_order != other.class_order
    assert again.digest() == digits.digest() == other.digest()


def test_the_avalanche_benchmark_is_the_same_stream_without_task_labels(digits):
    benchmark = digits.benchmark()
    for index, pick, images in (
        (digits.train_index, benchmark.train_stream, digits.train_images),
        (digits.test_index, benchmark.test_stream, digits.test_images),
    ):
        for positions, classes, experience in zip(
            index, digits.experience_classes, pick, strict=True
        ):
            assert set(experience.classes_in_this_experience) == set(classes)
            assert len(experience.dataset) == len(positions)
            # Avalanche stores an experience class by class, in an order of its own.
            pixels, labels, tasks = zip(*experience.dataset, strict=True)
            found = sorted(tuple(image.flatten().tolist()) for image in pixels)
            assert found == sorted(map(tuple, images(positions).flatten(1).tolist()))
            assert set(map(int, labels)) == set(classes) and set(tasks) == {0}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["split-mnist", "split-fashion-mnist"])
def test_data_laid_out_like_torchvision_is_read(tmp_path, name, compress):
    dataset = {"split-mnist": "MNIST", "split-fashion-mnist": "FashionMNIST"}[name]
    write_folder(tmp_path / dataset / "raw", compress)
    stream = load(name, 0, tmp_path)
    assert stream.data.train_pixels.shape == (40, 1, 28, 28)
    assert stream.test_counts == [4] * 5


def test_the_raw_folder_itself_may_be_named(tmp_path):
    write_folder(tmp_path)
    assert len(load("split-mnist", 0, str(tmp_path)).data.test_labels) == 20


def test_the_debian_package_is_found(tmp_path, monkeypatch):
    write_folder(tmp_path / "package", compress=True)
    monkeypatch.setattr(mnist, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    read = mnist.read_fashion_mnist(None)
    assert len(read.train_labels) == 40


def test_missing_data_without_a_network_is_one_line_that_says_how_to_get_it(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    with pytest.raises(DataError, match=r"cannot be fetched.*--data-dir") as raised:
        load("split-mnist", 0, tmp_path)
    assert "\n" not in str(raised.value)


def damaged(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "truncated"),
        ("train-images-idx3-ubyte", lambda raw: raw[:9], "too few"),
        ("train-images-idx3-ubyte", lambda raw: b"", "too few"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"\0", "header says"),
        ("train-labels-idx1-ubyte", lambda raw: b"\1" + raw[1:], "magic number"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx_bytes(np.arange(19) % 10), "19 labels"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\x0b", "label 11"),
        ("t10k-images-idx3-ubyte", lambda raw: gzip.compress(raw)[:-20], "torn"),
        ("t10k-images-idx3-ubyte", lambda raw: b"\x1f\x8bnot gzip at all", "torn"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, change, message):
    write_folder(tmp_path)
    damaged(tmp_path, name, change)
    with pytest.raises(DataError, match=message) as raised:
        load("split-mnist", 0, tmp_path)
    assert name in str(raised.value)


def test_an_absurd_header_is_refused_before_memory_is_asked_for(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(DataError, match="header says"):
        idx.read_idx(path, 3)


def test_a_missing_one_of_four_files_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        load("split-mnist", 0, tmp_path)


def test_an_unknown_stream_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean split-mnist"):
        load("splitmnist", 0)


def test_classes_that_do_not_divide_evenly_are_refused():
    labels = torch.arange(3).repeat(4)
    pixels = torch.zeros(12, 1, 4, 4, dtype=torch.uint8)
    data = Data(pixels, labels, pixels, labels, white=255)
    with pytest.raises(ValueError, match="3 classes cannot be cut into 2"):
        class_incremental("tiny", data, 0, num_experiences=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_pixels": torch.full((4, 1, 2, 2), float("nan"))}, "train_pixels, example 0.*NaN"),
        ({"test_pixels": torch.tensor([0.0, torch.inf] * 8).view(4, 1, 2, 2)}, "infinity"),
        ({"train_labels": torch.tensor([0, 1, -1, 0])}, "0 or more, got -1"),
        ({"test_labels": torch.tensor([0, 1, 0])}, r"int64 \[4\], got torch.int64 \(3,\)"),
        ({"test_labels": torch.zeros(4)}, "int64"),
        ({"test_pixels": torch.zeros(4, 1, 3, 3)}, r"\(1, 2, 2\), but test images.*\(1, 3, 3\)"),
        ({"train_pixels": torch.zeros(4, 2, 2)}, "N, C, H, W"),
        ({"train_pixels": torch.zeros(4, 1, 2, 2).double()}, "float64"),
    ],
)
def test_data_that_is_not_whole_is_refused_before_it_becomes_a_stream(change, message):
    labels = torch.tensor([0, 1, 0, 1])
    images = torch.zeros(4, 1, 2, 2)
    good = {
        "train_pixels": images,
        "train_labels": labels,
        "test_pixels": images,
        "test_labels": labels,
    }
    Data(**good, white=1)
    with pytest.raises(ValueError, match=message):
        Data(**{**good, **change}, white=1)
