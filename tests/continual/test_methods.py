"""The baselines: what they learn, what they keep, and that Avalanche measures the same."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from brief_methods import briefly
from rows import rows

from growmoe.continual import METHODS, load, metrics
from growmoe.continual.features import RandomPatchFeatures
from growmoe.continual.methods import online
from growmoe.continual.rivals.learner import BOUNDARIES, EXAMPLES, TASK_LABELS
from growmoe.continual.streams import Data, class_incremental

pytest.importorskip("avalanche")

from growmoe.continual import baselines
from growmoe.continual.ridge import RidgeHead

FAST = baselines.Training(hidden=32, min_steps=10)


def silent(fraction, text):
    assert 0 <= fraction <= 1 and isinstance(text, str)


@pytest.fixture(scope="module")
def digits():
    return load("split-digits", seed=0)


@pytest.fixture(scope="module")
def tiny():
    """Six classes of 8x8 images, each a bright row of its own; uneven test counts."""
    rng = np.random.default_rng(0)

    def images(counts):
        labels = np.repeat(np.arange(6), counts)
        pixels = rng.integers(0, 60, (len(labels), 1, 8, 8))
        pixels[np.arange(len(labels)), 0, labels] += 150
        return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)

    data = Data(*images([30] * 6), *images([5, 10, 15, 20, 25, 30]), white=255)
    return class_incremental("tiny", data, seed=0, num_experiences=3)


def test_every_method_is_described_in_a_line_and_its_settings_are_json():
    for name, method in METHODS.items():
        assert len(f"{name:<15}{method.description}") <= 80
        assert method.settings and json.loads(json.dumps(dict(method.settings)))


# born of a short-term memory of 500, of which the tiny stream has a third
EXPERTLESS = ("cn-dpm",)


def check(cell, side):
    matrix = np.array(cell.accuracy_matrix)
    assert matrix.shape == (side, side) and (matrix >= 0).all() and (matrix <= 1).all()
    assert cell.seconds > 0 and cell.memory.model == 4 * cell.parameters
    assert cell.memory_bytes == sum(dataclasses.asdict(cell.memory).values())
    json.dumps(dataclasses.asdict(cell))


# one of each kind; the others with the slow ones
QUICK = ("growmoe", "naive", "replay", "slda", "pnn", "sema", "ridge")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_every_method_fills_its_cell_online(tiny, name):
    torch.manual_seed(0)
    cell = briefly(10)[name].run(tiny, 0, silent)
    check(cell, 3)
    assert cell.parameters > 0 or name in EXPERTLESS
    assert bool(cell.memory.examples) <= (EXAMPLES in METHODS[name].needs or name == "growmoe")


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"scenario": "domain"}, {"drift": "fuzzy"}, {"scenario": "task"}])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_runs_on_every_kind_of_stream(name, how):
    torch.manual_seed(0)
    check(briefly(10)[name].run(rows(experiences=2, classes=4, each=15, **how), 0, silent), 2)


def test_online_is_one_pass_in_small_mini_batches():
    for name, method in online(10).items():
        assert method.description == METHODS[name].description
        assert method.needs == METHODS[name].needs
        if name != "joint":
            assert method.settings["batch_size"] == 10
            assert method.settings.get("min_steps", 0) == 0
    assert online(7, {"naive": METHODS["naive"]})["naive"].settings["batch_size"] == 7


def test_what_a_method_needs_is_one_of_few():
    for method in METHODS.values():
        assert set(method.needs) <= {BOUNDARIES, TASK_LABELS, EXAMPLES}
    free = {name for name, method in METHODS.items() if not method.needs}
    assert {"growmoe", "ridge", "slda", "ranpac", "sema", "dynmoe", "naive"} <= free


def run_fast(name, stream, training=FAST):
    options = {
        k: v
        for k, v in METHODS[name].settings.items()
        if k not in dataclasses.asdict(baselines.Training())
    }
    function = {"a-gem": "run_agem", "der++": "run_der", "er-ace": "run_er_ace"}.get(
        name, f"run_{name}"
    )
    return getattr(baselines, function)(stream, 0, silent, training, **options)


@pytest.mark.slow
def test_memory_counts_what_each_method_keeps(tiny):
    parameters = 64 * 32 + 32 + 32 * 32 + 32 + 32 * 6 + 6
    naive, ewc, lwf, joint = (run_fast(n, tiny) for n in ("naive", "ewc", "lwf", "joint"))
    replay = baselines.run_replay(tiny, 0, silent, FAST, exemplars=30)
    assert naive.parameters == parameters
    assert naive.memory_bytes == 4 * parameters
    assert ewc.memory.statistics == 3 * 2 * 4 * parameters  # importances, old weights; 3 times
    assert lwf.memory.buffers == 4 * parameters
    assert replay.memory.examples == 30 * (64 + 1)
    assert joint.memory.examples == 180 * (64 + 1)
    agem, der, ace, gdumb = (run_fast(n, tiny) for n in ("a-gem", "der++", "er-ace", "gdumb"))
    # all fit: 1,000 would be kept
    assert {c.memory.examples for c in (agem, der, ace, gdumb)} == {180 * (64 + 1)}
    assert der.memory.statistics == 180 * 6 * 4


@pytest.mark.slow
def test_nothing_against_forgetting_forgets_and_replay_does_not(digits):
    training = baselines.Training(min_steps=40)
    torch.manual_seed(0)
    naive = run_fast("naive", digits, training).accuracy_matrix
    torch.manual_seed(0)
    replay = run_fast("replay", digits, training).accuracy_matrix
    assert metrics.final_accuracy(naive) < 0.3 < 0.85 < metrics.final_accuracy(replay)
    assert metrics.forgetting(naive) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdumb", "der++", "er-ace", "a-gem"])
def test_examples_help_against_forgetting(name):
    stream = rows()
    torch.manual_seed(0)
    training = baselines.Training(hidden=32, learning_rate=3e-3, min_steps=60)
    accuracy = metrics.final_accuracy(run_fast(name, stream, training).accuracy_matrix)
    assert accuracy > (0.5 if name == "a-gem" else 0.85)


def test_the_matrix_is_what_avalanches_evaluation_gives(tiny):
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    model = baselines.mlp(tiny, 8)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        evaluator=evaluator,
        eval_mb_size=50,
    )
    run = baselines.CellRun(tiny, silent)
    found = strategy.eval(run.benchmark.test_stream)
    name = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{:03d}"
    assert run.untrained(strategy) == pytest.approx([found[name.format(j)] for j in range(3)])


def test_the_same_seed_gives_the_same_matrix(tiny):
    matrices = []
    for _ in range(2):
        torch.manual_seed(7)
        matrices.append(run_fast("replay", tiny).accuracy_matrix)
    assert matrices[0] == matrices[1]


@pytest.mark.slow
def test_metrics_equal_avalanches_where_both_define_them(tiny):
    """Accuracy over all test images; and forgetting, where the best is right after learning."""
    from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    model = baselines.mlp(tiny, 32)
    benchmark = tiny.benchmark()
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True),
        forgetting_metrics(stream=True),
        bwt_metrics(stream=True),
        loggers=[],
    )
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        train_mb_size=8,
        train_epochs=10,
        eval_mb_size=50,
        evaluator=evaluator,
    )
    matrix = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        found = strategy.eval(benchmark.test_stream)
        exp = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{:03d}"
        matrix.append([found[exp.format(j)] for j in range(3)])
    assert (np.argmax(matrix, axis=0)[:2] == [0, 1]).all()  # else the definitions differ
    stream_accuracy = found["Top1_Acc_Stream/eval_phase/test_stream/Task000"]
    assert metrics.final_accuracy(matrix, tiny.test_counts) == pytest.approx(stream_accuracy)
    assert metrics.forgetting(matrix) == pytest.approx(
        found["StreamForgetting/eval_phase/test_stream"]
    )
    assert metrics.backward_transfer(matrix) == pytest.approx(
        found["StreamBWT/eval_phase/test_stream"]
    )


def test_ridge_head_equals_least_squares_in_one_go_and_in_any_order():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 7, generator=generator)
    y = torch.randint(0, 4, (200,), generator=generator)
    ones = torch.cat([x, torch.ones(200, 1)], 1).double()
    penalty = 0.01 * ones.square().sum() / 8 * torch.eye(8, dtype=torch.double)
    target = torch.nn.functional.one_hot(y, 4).double()
    expected = torch.linalg.solve(ones.T @ ones + penalty, ones.T @ target)
    for order in (torch.arange(200), torch.randperm(200, generator=generator)):
        head = RidgeHead.zeros(7, 4, ridge=0.01)
        for part in order.split(33):
            head.add(x[part], y[part])
        head.solve()
        torch.testing.assert_close(head.W_DK.double(), expected, rtol=1e-4, atol=1e-5)


def test_ridge_ends_the_same_whatever_the_class_order(digits):
    images, labels = digits.train_images(), digits.data.train_labels
    features = RandomPatchFeatures(filters=8, patch_size=3)
    features.fit(images, torch.Generator().manual_seed(0))
    tested = features(digits.test_images())
    answers = []
    for index in (digits.train_index, digits.train_index[::-1]):
        head = RidgeHead.zeros(features.num_features, 10, ridge=1e-3)
        for part in index:
            head.add(features(images[part]), labels[part])
        head.solve()
        answers.append(head(tested).argmax(1))
    assert (answers[0] == answers[1]).float().mean() > 0.99
    assert (answers[0] == digits.data.test_labels).float().mean() > 0.9


@pytest.mark.parametrize("size", [8, 28])
def test_features_are_what_a_loop_over_patches_gives(size):
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(1))
    features = RandomPatchFeatures.for_images(size, size)
    features.fit(images, torch.Generator().manual_seed(0))
    found = features(images)
    assert found.shape == (3, features.num_features) and found.dtype == torch.float32
    side, grid = features.patch_size, features.grid
    places = size - side + 1
    image = images[1, 0].double()
    response = torch.zeros(features.filters, places, places, dtype=torch.double)
    for i in range(places):
        for j in range(places):
            patch = image[i : i + side, j : j + side].flatten()
            z = patch @ features._filter_QF.double() + features._bias_F.double()
            spread = (patch.square().mean() - patch.mean() ** 2 + features._floor).sqrt()
            response[:, i, j] = z.clamp(min=0) / spread
    edges = [round(i * places / grid) for i in range(grid + 1)]
    cells = [
        response[:, edges[i] : edges[i + 1], edges[j] : edges[j + 1]].mean((1, 2)).sqrt()
        for i in range(grid)
        for j in range(grid)
    ]
    apart = torch.stack(cells) - features._mean_F
    expected = (apart @ features._component_FK.double()).flatten()
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-3, atol=1e-4)


def test_features_depend_on_the_images_and_the_generator_alone():
    images = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    options = {"filters": 4, "patch_size": 3, "fit_patches": 100}
    first = RandomPatchFeatures(**options).fit(images, torch.Generator().manual_seed(0))
    again = RandomPatchFeatures(**options).fit(images, torch.Generator().manual_seed(0))
    other = RandomPatchFeatures(**options).fit(images, torch.Generator().manual_seed(1))
    assert torch.equal(first._filter_QF, again._filter_QF)
    assert not torch.equal(first._filter_QF, other._filter_QF)


def test_features_of_blank_images_are_finite():
    features = RandomPatchFeatures.for_images(8, 8)
    features.fit(torch.zeros(5, 1, 8, 8), torch.Generator().manual_seed(0))
    assert features(torch.zeros(2, 1, 8, 8)).isfinite().all()


def test_features_refuse_what_they_cannot_take():
    with pytest.raises(RuntimeError, match="fitted"):
        RandomPatchFeatures()(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        RandomPatchFeatures().fit(torch.zeros(1, 28, 28), torch.Generator())
    with pytest.raises(ValueError, match="at least 8"):
        RandomPatchFeatures().fit(torch.zeros(1, 1, 5, 5), torch.Generator())
