"""Every stream shows each example once, in the order that its drift promises."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe.continual.ordering import arrange
from growmoe.continual.scenarios import in_turn, permuted, rotated, split
from growmoe.continual.stream import DRIFTS, SCENARIOS, Data
from growmoe.continual.streams import Options, full_name, load


def tiny(classes=4, each=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    pixels = torch.randint(0, 256, (len(labels), 1, 6, 6), generator=generator, dtype=torch.uint8)
    return Data(pixels, labels, pixels[: 3 * classes], labels[: 3 * classes], white=255)


def stream(family=split, experiences=2, seed=0, **how):
    return arrange("tiny", family(tiny(), seed, experiences), seed, **how)


@pytest.mark.parametrize("family", [split, permuted, rotated])
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_example_comes_once_and_labels_are_in_range(family, drift, scenario):
    made = stream(family, 4, scenario=scenario, drift=drift)
    order = torch.cat(made.train_index)
    assert order.sort().values.tolist() == list(range(len(made.data.train_labels)))
    assert int(made.data.train_labels.min()) >= 0
    assert int(made.data.train_labels.max()) < made.num_classes
    for index, classes in zip(made.test_index, made.experience_classes, strict=True):
        assert set(made.data.test_labels[index].tolist()) <= set(classes)
    if family is not split:
        assert made.num_classes == (4 if scenario == "domain" else 16)


@given(
    batch_size=st.integers(1, 50),
    drift=st.sampled_from(DRIFTS),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_batches_give_the_whole_stream_and_every_end_once(batch_size, drift, epochs, seed):
    made = stream(experiences=4, seed=seed, drift=drift)
    batches = list(made.batches(batch_size, epochs))
    assert sum(len(b.labels) for b in batches) == epochs * made.num_examples
    assert all(len(b.labels) == batch_size for b in batches[:-1])
    assert [i for b in batches for i in b.ends] == list(range(made.num_experiences))
    if epochs == 1:
        labels = torch.cat([b.labels for b in batches])
        assert labels.tolist() == made.data.train_labels[torch.cat(made.train_index)].tolist()


def test_sharp_experiences_are_one_domain_each_and_boundaries_fall_inside_batches():
    made = stream()
    for i, index in enumerate(made.train_index):
        assert set(made.train_domain[index].tolist()) == {i}
    assert any(len(set(b.domains.tolist())) == 2 for b in made.batches(32))


def test_a_fuzzy_boundary_rises_linearly_and_stays_away_from_the_middle():
    data = tiny(2, 4000)
    made = arrange("tiny", split(data, 0, 2), 0, drift="fuzzy", overlap=0.5)
    domains = made.train_domain[torch.cat(made.train_index)].double()
    assert set(domains[:2900].tolist()) == {0.0} and set(domains[-2900:].tolist()) == {1.0}
    # from 3,000 to 5,000 the share of the second domain goes from 0 to 1
    for begin in range(3000, 5000, 500):
        middle = (begin + 250 - 3000) / 2000
        assert domains[begin : begin + 500].mean().item() == pytest.approx(middle, abs=0.08)


def test_recurring_domains_all_come_before_any_returns_and_never_twice_in_a_row():
    made = stream(experiences=4, drift="recurring", visits=3)
    order = made.experience_domain
    assert order[:4] == (0, 1, 2, 3) and sorted(order) == sorted([0, 1, 2, 3] * 3)
    assert all(a != b for a, b in itertools.pairwise(order))
    assert made.num_experiences == 12 and made.num_domains == 4


def test_without_drift_every_piece_holds_every_domain():
    made = stream(experiences=4, drift="none")
    for index in made.train_index:
        assert set(made.train_domain[index].tolist()) == {0, 1, 2, 3}


def test_permuted_keeps_the_first_domain_and_every_pixel_of_the_others():
    data = tiny()
    made = permuted(data, 0, 3)
    first, second, _ = made.data.train_pixels.split(len(data.train_labels))
    assert torch.equal(first, data.train_pixels)
    assert not torch.equal(second, first)
    assert torch.equal(second.flatten(1).sort(1).values, first.flatten(1).sort(1).values)


def test_rotated_by_a_right_angle_is_a_right_angle():
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 1, 2:5] = 200
    data = Data(pixels, torch.arange(2), pixels, torch.arange(2), white=255)
    made = rotated(data, 0, 2)  # 0 and 90 degrees, in some order
    images = {tuple(image.flatten().tolist()) for image in made.data.train_pixels}
    turns = [torch.rot90(pixels[0], k, (1, 2)) for k in (0, 1, 3)]
    assert tuple(turns[0].flatten().tolist()) in images
    assert len(images & {tuple(turn.flatten().tolist()) for turn in turns[1:]}) == 1


def test_the_task_scenario_asks_among_the_experiences_own_classes_and_no_other_does():
    made = stream(scenario="task")
    scores = torch.arange(8.0).reshape(2, 4)
    for j, classes in enumerate(made.experience_classes):
        assert set(made.restrict(scores, j).argmax(1).tolist()) <= set(classes)
    assert stream().restrict(scores, 0) is scores


def test_task_labels_reach_avalanche_in_the_task_scenario_alone():
    for scenario, expected in (("task", [0, 1]), ("class", [0, 0])):
        benchmark = stream(scenario=scenario).benchmark()
        for experiences in (benchmark.train_stream, benchmark.test_stream):
            assert [int(e.dataset[0][2]) for e in experiences] == expected


def test_avalanche_has_the_examples_in_their_order():
    made = stream(drift="fuzzy")
    for index, experience in zip(made.train_index, made.benchmark().train_stream, strict=True):
        images, labels, _ = zip(*experience.dataset, strict=True)
        assert torch.equal(torch.stack(images), made.train_images(index))
        assert [int(y) for y in labels] == made.data.train_labels[index].tolist()


def test_the_seed_decides_the_stream_and_the_fingerprint_is_of_the_data():
    names = ["permuted-digits:drift=fuzzy", "rotated-digits:examples=20,tests=10"]
    for name in names:
        one, same, other = load(name, 0), load(name, 0), load(name, 1)
        assert torch.equal(torch.cat(one.train_index), torch.cat(same.train_index))
        assert torch.equal(one.data.train_pixels, same.data.train_pixels)
        assert not torch.equal(one.data.train_pixels, other.data.train_pixels)
        assert one.digest() == other.digest()
    assert one.num_examples == 200 and one.test_counts == [10] * 10


def test_data_sets_in_turn_have_classes_of_their_own_and_must_be_alike():
    made = arrange("two", in_turn([tiny(2), tiny(3, seed=1)]), 0)
    assert made.num_classes == 5 and made.experience_classes == ((0, 1), (2, 3, 4))
    other = Data(torch.zeros(2, 1, 5, 5, dtype=torch.uint8), torch.arange(2),
                 torch.zeros(2, 1, 5, 5, dtype=torch.uint8), torch.arange(2), 255)  # fmt: skip
    with pytest.raises(ValueError, match=r"change from \(1, 6, 6\).*to \(1, 5, 5\)"):
        in_turn([tiny(2), other])


def test_an_experience_with_one_class_or_one_example_is_a_stream_like_any_other():
    one = Data(torch.zeros(1, 1, 6, 6, dtype=torch.uint8), torch.tensor([0]),
               torch.zeros(1, 1, 6, 6, dtype=torch.uint8), torch.tensor([0]), 255)  # fmt: skip
    made = arrange("tiny", in_turn([tiny(2), one]), 0)
    assert [len(index) for index in made.train_index] == [60, 1]
    assert [b.ends for b in made.batches(61)] == [(0, 1)]


def test_names_with_options_have_one_spelling():
    assert full_name("split-digits:drift=sharp", Options(experiences=5)) == "split-digits"
    name = full_name("permuted-digits:examples=50", Options(drift="fuzzy"))
    assert name == full_name("permuted-digits:drift=fuzzy,examples=50", Options())
    assert load(name, 0).drift == "fuzzy" and load(name, 0).name == name


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("permuted-digits:drfit=fuzzy", KeyError, "did you mean drift"),
        ("permuted-digits:drift=fuzy", ValueError, "sharp, fuzzy, recurring, none"),
        ("permuted-digits:examples=many", ValueError, "cannot be 'many'"),
        ("permuted-digits:examples=0", ValueError, "examples must be positive"),
        ("permuted-digits:overlap=2", ValueError, "overlap must be from 0 to 1"),
        ("split-digits:experiences=3", ValueError, "10 classes cannot be cut into 3"),
        ("split-digits:scenario=classes", ValueError, "class, domain, task"),
    ],
)
def test_a_wrong_option_says_what_is_right(name, error, message):
    with pytest.raises(error, match=message):
        load(name, 0)
