"""Data of each kind is read whole, or what is missing or damaged is named."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from growmoe.continual.data import glyphs
from growmoe.continual.data.idx import DataError
from growmoe.continual.streams import load


def write_cifar10(folder, count=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))


def test_cifar_is_read_as_torchvision_lays_it_out(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        stream = load("split-cifar-10", 0, place)
        assert stream.image_shape == (3, 32, 32) and stream.num_examples == 100
        assert stream.test_counts == [4] * 5


class Evil:
    def __reduce__(self):
        return (print, ("called",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "torn"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})[:-9], "torn"),
        (pickle.dumps(Evil()), "it asks for builtins.print"),
        (pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}), "3072"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "0 to 9"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images, but"),
        (None, "lacks data_batch_3"),
    ],
)
def test_a_damaged_or_malicious_cifar_file_is_named_and_nothing_in_it_is_called(
    tmp_path, capsys, content, message
):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load("split-cifar-10", 0, tmp_path)
    assert "data_batch_3" in str(raised.value) and capsys.readouterr().out == ""


@pytest.fixture
def pictures(tmp_path):
    for kind, count in (("train", 3), ("test", 1)):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / kind / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.full((4, 5, 3), 50 * k + i, np.uint8))
                image.save(tmp_path / kind / name / f"{i}.png")
    return tmp_path


def test_folders_of_pictures_become_a_stream_with_classes_by_name(pictures):
    stream = load("split-folders:experiences=2", 0, pictures)
    assert stream.image_shape == (3, 4, 5) and stream.num_examples == 6
    dogs = stream.data.train_pixels[stream.data.train_labels == 1]
    assert sorted(dogs[:, 0, 0, 0].tolist()) == [50, 51, 52]


def test_a_torn_picture_another_size_or_class_and_an_empty_folder_are_named(pictures):
    path = pictures / "train" / "cat" / "0.png"
    good = path.read_bytes()

    def refused(message):
        with pytest.raises(DataError, match=message):
            load("split-folders:experiences=2", 0, pictures)

    path.write_bytes(good[:40])
    refused(r"0\.png: cannot be read")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    refused("differ in size")
    path.write_bytes(good)
    (pictures / "test" / "fox").mkdir()
    refused("fox")
    with pytest.raises(DataError, match="--data-dir"):
        load("split-folders", 0)


needs_fonts = pytest.mark.skipif(not glyphs.NOTO.exists(), reason="needs fonts-noto-core")


@needs_fonts
@pytest.mark.slow
def test_glyphs_are_ten_scripts_of_ten_letters_that_differ():
    stream = load("glyphs", 0)
    assert stream.num_classes == 100 and stream.num_domains == 10
    assert stream.num_examples == 6000 and sum(stream.test_counts) == 2000
    images = stream.train_images()
    assert (images.flatten(1).amax(1) > 0.5).all()
    means = torch.stack([images[stream.data.train_labels == k].mean(0) for k in range(100)])
    distances = torch.cdist(means.flatten(1), means.flatten(1)) + 100 * torch.eye(100)
    # missing letters would all be the same empty box
    assert distances.min() > 0.5


def test_fonts_that_are_missing_name_the_package(tmp_path):
    with pytest.raises(DataError, match="fonts-noto-core"):
        load("glyphs", 0, tmp_path)
