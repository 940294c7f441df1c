"""Checkpoints: training goes on bit for bit, any structure loads, bad files change nothing."""

import gc
import json
import math
import random
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from slow_parameters import but_slow
from snapshots import copied, differences, of_everything
from torch import nn

from growmoe import EMA, FFN, MoE, Organizer, TopK, load, save, surgery
from growmoe.rules import FreezeConverged, MergeSimilar, PruneIdle, SpawnOnOverload

D = 8


class Linear(nn.Module):
    """A user's own kind of expert."""

    def __init__(self, width=D):
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x):
        return self.map(x)


class Host(nn.Module):
    """Two layers and a normalisation with running statistics; noise and dropout draw numbers."""

    def __init__(self, experts=(4, 3), expert=None, seed=0):
        super().__init__()
        expert = FFN(16) if expert is None else expert
        self.first = MoE(D, expert, experts[0], TopK(2, noise=0.3), seed=seed)
        self.norm = nn.BatchNorm1d(D)
        self.drop = nn.Dropout(0.1)
        self.second = MoE(D, FFN(8, "swiglu"), experts[1], TopK(1), evidence="moments", seed=seed)

    def forward(self, x):
        return self.second(self.drop(self.norm(x + self.first(x))))


def adamw_fused(model):
    return [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)]


def adamw_named(model):
    return [torch.optim.AdamW(model.named_parameters(), lr=1e-2, amsgrad=True)]


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)]


def several(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.NAdam([{"params": vectors[:1], "lr": 1e-3}, {"params": vectors[1:]}]),
    ]


OPTIMIZERS = [adamw_fused, adamw_named, sgd, several]


class Run:
    """A model in training with all that belongs to it."""

    def __init__(self, optimizers, experts=(4, 3), seed=0, every=6):
        self.model = Host(experts, seed=seed)
        self.optimizers = optimizers(self.model)
        self.organizer = Organizer(
            self.model,
            self.optimizers,
            [SpawnOnOverload(1.2, 1), MergeSimilar(0.5, 20), PruneIdle(10), FreezeConverged(9, 20)],
            every=every,
            cooldown=12,
            max_experts=6,
            tolerance=1.0,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizers[0], 9)
        self.losses = []

    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            x = torch.randn(32, D) * np.random.uniform(0.5, 2) + random.random()
            loss = (self.model(x) - x.flip(1)).square().mean()
            (
                loss + sum(a for a in map(MoE.aux_loss, (self.model.first, self.model.second)))
            ).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for o in self.optimizers:
                o.step()
                o.zero_grad()
            self.scheduler.step()
            self.organizer.step(loss)
            self.losses.append(loss.item())

    def save(self, path):
        save(path, self.model, self.optimizers, self.organizer, scheduler=self.scheduler)

    def load(self, path):
        load(path, self.model, self.optimizers, self.organizer, scheduler=self.scheduler)

    def everything(self):
        names = {id(p): n for n, p in self.model.named_parameters()}
        layers = (self.model.first, self.model.second)
        return {
            "weights": copied(dict(sorted(self.model.named_parameters()))),
            "buffers": copied(dict(sorted(self.model.named_buffers()))),
            "lineages": [[str(e) for e in layer.lineage] for layer in layers],
            "counters": [[layer.next_id, layer.steps] for layer in layers],
            "generators": [layer.generator.get_state() for layer in layers],
            "frozen": [[i for i, e in layer.experts.items() if e.frozen] for layer in layers],
            "groups": [
                [
                    {k: sorted(names[id(p)] for p in v) if k == "params" else copied(v)
                     for k, v in sorted(g.items())}
                    for g in o.param_groups
                ]
                for o in self.optimizers
            ],
            "states": [
                dict(sorted((names[id(p)], copied(s)) for p, s in o.state.items()))
                for o in self.optimizers
            ],
            "organizer": self.organizer.state_dict(),
            "schedule": {k: copied(v) for k, v in self.scheduler.state_dict().items()},
            "random": [torch.get_rng_state(), random.random(), float(np.random.uniform())],
        }  # fmt: skip


def seed_all(seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("optimizers", but_slow(OPTIMIZERS, several))
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(optimizers, tmp_path):
    path = tmp_path / "run.safetensors"
    seed_all()
    whole = Run(optimizers)
    whole.train(20)
    surgery.spawn(whole.model.first, 1, whole.optimizers)  # one surgery before, others after
    whole.save(path)
    acts_before = len(whole.model.first.lineage)
    whole.losses.clear()
    whole.train(25)
    final = whole.everything()
    assert len(whole.model.first.lineage) > acts_before

    seed_all(99)
    resumed = Run(optimizers, experts=(2, 5), seed=5)
    resumed.load(path)
    resumed.train(25)
    assert resumed.losses == whole.losses
    assert differences(final, resumed.everything()) == []


def test_a_run_without_an_organizer_goes_on_bit_for_bit_with_surgeries_by_hand(tmp_path):
    def train(model, optimizer, steps):
        for _ in range(steps):
            x = torch.randn(16, D)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def later(model, optimizer):
        train(model, optimizer, 5)
        surgery.merge(model, [0, 4], optimizer)
        surgery.spawn(model, None, optimizer)
        train(model, optimizer, 5)
        return of_everything(model, [optimizer])

    model = MoE(D, FFN(16), 4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, 5)
    surgery.spawn(model, 2, optimizer)
    surgery.freeze(model, [3])
    save(tmp_path / "a", model, optimizer, extra={"epoch": 3})
    first = later(model, optimizer)
    other = MoE(D, FFN(16), 2, seed=1)
    again = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)
    assert load(tmp_path / "a", other, again) == {"epoch": 3}
    second = later(other, again)
    for part in ("buffers", "lineages", "counters", "generators", "random"):
        assert differences(first[part], second[part]) == []
    for name, (_, value, _) in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name][1])


@pytest.mark.parametrize("experts", [(2, 1), (4, 3), (9, 9)])
def test_a_checkpoint_loads_into_a_model_of_any_number_of_experts(experts, tmp_path):
    seed_all()
    run = Run(several)
    run.train(14)
    surgery.freeze(run.model.second, [0])
    run.save(tmp_path / "a")
    before = run.everything()
    other = Run(several, experts=experts, seed=3)
    other.load(tmp_path / "a")
    assert differences(before, other.everything()) == []
    for layer in (other.model.first, other.model.second):
        assert layer.lineage.replay() == list(layer.experts)
    held = [id(p) for o in other.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, other.model.parameters()))
    other.train(2)


def test_kinds_of_ones_own_are_rebuilt_by_the_factory_that_is_given(tmp_path):
    path = tmp_path / "a"
    model = Host(expert=[FFN(16), Linear, FFN(8, "relu", bias=True), nn.Linear(D, D)])
    save(path, model)
    other = Host((2, 2))
    kind = f"{Linear.__module__}.Linear"
    before = of_everything(other)
    with pytest.raises(ValueError, match=r"is a .*Linear, which is not known here; pass experts="):
        load(path, other)
    assert differences(before, of_everything(other)) == []
    load(
        path,
        other,
        experts={kind: Linear, "torch.nn.modules.linear.Linear": lambda: nn.Linear(D, D)},
    )
    x = torch.randn(9, D)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert [type(e.body).__name__ for e in other.first.experts.values()] == [
        "FFN", "Linear", "FFN", "Linear",
    ]  # fmt: skip


def test_a_factory_of_another_shape_is_refused(tmp_path):
    save(tmp_path / "a", Host(expert=Linear))
    other = Host((2, 2))
    before = of_everything(other)
    wide = {f"{Linear.__module__}.Linear": lambda: nn.Sequential(nn.Linear(D, 5), nn.Linear(5, D))}
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path / "a", other, experts=wide)
    assert differences(before, of_everything(other)) == []


def test_a_plain_state_dict_loads_across_numbers_of_experts():
    model, other = Host((5, 2)), Host((3, 4), seed=2)
    surgery.freeze(model.first, [1])
    surgery.prune(model.first, [2])
    other.load_state_dict(model.state_dict())
    assert list(other.first.experts) == [0, 1, 3, 4] and other.first.experts[1].frozen
    x = torch.randn(9, D)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert other.first.lineage.replay() == [0, 1, 3, 4]
    assert surgery.spawn(other.first).child == 5


def test_a_state_dict_of_another_structure_is_refused_under_a_live_optimizer():
    state = MoE(D, FFN(16), 5, seed=1).state_dict()
    model = MoE(D, FFN(16), 3, seed=2)
    optimizer = torch.optim.Adam(model.parameters())
    before = of_everything(model, [optimizer])
    with pytest.raises(ValueError, match=r"an optimizer \(Adam\) trains this layer"):
        model.load_state_dict(state)
    assert differences(before, of_everything(model, [optimizer])) == []
    model.load_state_dict(MoE(D, FFN(16), 3, seed=1).state_dict())  # the same structure may load
    del optimizer
    model.load_state_dict(state)
    assert len(model.experts) == 5


def test_a_structure_with_too_few_experts_for_the_router_is_refused(tmp_path):
    save(tmp_path / "a", MoE(D, FFN(16), 2, TopK(1), seed=1))
    model = MoE(D, FFN(16), 4, TopK(3), seed=2)
    before = of_everything(model)
    with pytest.raises(ValueError, match="needs at least 3 experts, the saved state has 2"):
        load(tmp_path / "a", model)
    assert differences(before, of_everything(model)) == []


# What is refused.


def small():
    model = MoE(4, FFN(4), 2, TopK(1), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def refused(path, kind, match):
    model, optimizer = small()
    before = of_everything(model, [optimizer])
    with pytest.raises(kind, match=match):
        load(path, model, optimizer)
    assert differences(before, of_everything(model, [optimizer])) == []


def test_a_torn_file_is_refused_wherever_it_was_torn(tmp_path):
    path = tmp_path / "a"
    save(path, *small())
    whole = path.read_bytes()
    for end in [0, 1, 7, 8, 9, *range(10, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(path, ValueError, "torn or no checkpoint|was not written by|is damaged")
    path.write_bytes(whole + b"\0")
    refused(path, ValueError, "torn or no checkpoint")


def test_a_flipped_byte_is_noticed_wherever_it_lies(tmp_path):
    path = tmp_path / "a"
    save(path, *small())
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    text = whole[8 : 8 + header]
    places = {*range(0, 8), *range(8, 100), *range(8 + header, len(whole), 197)}
    places |= {8 + i for i in range(0, header, 531)} | {len(whole) - 1}
    for word in (b'"dtype"', b'"shape"', b'"F32"', b"checksum", b"content", b"format"):
        at = 8 + text.index(word)
        places |= set(range(at, at + len(word)))
    model, optimizer = small()
    before = of_everything(model, [optimizer])
    for place in sorted(places):
        for mask in (0x01,) if place % 3 else (0x01, 0x80):
            broken = bytearray(whole)
            broken[place] ^= mask
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=r"torn or no|was not written by|is damaged"):
                load(path, model, optimizer)
    assert differences(before, of_everything(model, [optimizer])) == []


def test_a_tensor_of_another_dtype_or_shape_of_the_same_bytes_is_noticed(tmp_path):
    path = tmp_path / "a"
    save(path, *small())
    whole = path.read_bytes()
    for old, new in ((b'"dtype":"F32"', b'"dtype":"I32"'), (b'"shape":[4,4]', b'"shape":[2,8]')):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        refused(path, ValueError, "is damaged")


def test_foreign_and_missing_files_are_named_as_such(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(path, small()[0])
    path.write_bytes(b"")
    refused(path, ValueError, "torn or no checkpoint")
    path.write_text("weights")
    refused(path, ValueError, "torn or no checkpoint")
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    refused(path, ValueError, "was not written by growmoe.save")
    safetensors.torch.save_file({"w": torch.ones(3)}, path, {"format": "growmoe-checkpoint-1"})
    refused(path, ValueError, "is damaged")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path, small()[0])


OTHERS = {
    "wider": lambda: MoE(8, FFN(4), 2, TopK(1)),
    "with a shared expert": lambda: MoE(4, FFN(4), 2, TopK(1), shared=FFN(4)),
    "with other evidence": lambda: MoE(4, FFN(4), 2, TopK(1), evidence="moments"),
    "in a host": lambda: nn.Sequential(MoE(4, FFN(4), 2, TopK(1))),
    "no mixture": lambda: nn.Linear(4, 4),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_architecture_is_refused_and_stays_as_it_was(other, tmp_path):
    model, optimizer = small()
    surgery.spawn(model, 0, optimizer)
    save(tmp_path / "a", model)
    target = OTHERS[other]()
    before = of_everything(target)
    with pytest.raises(ValueError, match=r"another model|has no experts|does not map d_model"):
        load(tmp_path / "a", target)
    assert differences(before, of_everything(target)) == []
    trainer = torch.optim.SGD(target.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"0 optimizers were saved, 1 are passed"):
        load(tmp_path / "a", target, trainer)
    assert differences(before["parameters"], of_everything(target)["parameters"]) == []


def test_another_optimizer_organizer_or_scheduler_than_was_saved_is_refused(tmp_path):
    path = tmp_path / "a"
    model, optimizer = small()
    surgery.spawn(model, 0, optimizer)
    save(path, model, optimizer)
    target, _ = small()
    del _
    two = [{"params": [p for p in target.parameters()][:1]}, {"params": [*target.parameters()][1:]}]

    def attempt(match, *arguments, **more):
        gc.collect()
        before = of_everything(target, arguments[:1] if arguments else ())
        with pytest.raises(ValueError, match=match):
            load(path, target, *arguments, **more)
        assert differences(before, of_everything(target, arguments[:1] if arguments else ())) == []

    attempt("the optimizer was SGD, not Adam", torch.optim.Adam(target.parameters()))
    attempt("1 parameter groups, this one has 2", torch.optim.SGD(two, lr=0.1))
    sgd = torch.optim.SGD(target.parameters(), lr=0.1, momentum=0.9)
    attempt("pass it as optimizer=")  # the structure differs, and sgd is alive
    with pytest.raises(ValueError, match="1 optimizers were saved, 2 are passed"):
        load(path, target, [sgd, sgd])
    attempt("no organizer was saved", sgd, Organizer(target, sgd))
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 3)
    attempt("no scheduler was saved", sgd, scheduler=schedule)
    load(path, target, sgd)


def test_an_optimizer_of_something_else_is_not_saved(tmp_path):
    model, _ = small()
    with pytest.raises(ValueError, match=r"holds a parameter of shape .* that is not the model's"):
        save(tmp_path / "a", model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = tmp_path / "a"
    model, optimizer = small()
    save(path, model, optimizer, extra="old")
    whole = path.read_bytes()
    for extra in (object(), {"f": print}, [np.ones(3)], {1, 2}):
        with pytest.raises(ValueError, match="cannot save extra"):
            save(path, model, optimizer, extra=extra)
    with pytest.raises(ValueError, match="cannot save scheduler"):
        lambdas = torch.optim.lr_scheduler.LambdaLR(optimizer, _Schedule())
        save(path, model, optimizer, scheduler=lambdas)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
    assert load(path, model, optimizer) == "old"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    with pytest.raises(OSError):
        save(tmp_path / "folder", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


class _Schedule:
    def __init__(self):
        self.rates = object()

    def __call__(self, epoch):
        return 1.0


def test_extra_comes_back_as_it_was(tmp_path):
    model, _ = small()
    extra = {
        "plain": [1, 2.5, -0.0, True, None, "text ü", 2**70, math.inf],
        "tuple": (1, (2, [3])),
        3: "three",
        (1, 2): {"tensor": torch.arange(3)},
        "dict": {"list": []},
        "empty": [torch.empty(0, 3), {}, ()],
        "kinds": [
            torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([True]), torch.tensor(7),
            torch.randn(2, 3, dtype=torch.float64).T,
        ],
        "numpy": np.float32(0.5),
    }  # fmt: skip
    save(tmp_path / "a", model, extra=extra)
    back = load(tmp_path / "a", model)
    assert list(back) == list(extra)
    assert differences(copied({**extra, "numpy": 0.5}), copied(back)) == []
    assert type(back["tuple"]) is tuple and type(back["tuple"][1][1]) is list
    save(tmp_path / "a", model, extra=[math.nan])
    assert math.isnan(load(tmp_path / "a", model)[0])


def test_tensors_whose_names_collide_do_not_overwrite_each_other(tmp_path):
    model, _ = small()
    extra = {
        "a/b": torch.tensor(1), "a": {"b": torch.tensor(2)},
        1: torch.tensor(3), "1": torch.tensor(4),
    }  # fmt: skip
    save(tmp_path / "a", model, extra=extra)
    assert load(tmp_path / "a", model) == extra


def test_the_random_state_comes_back_unless_it_is_not_wanted(tmp_path):
    model, _ = small()
    seed_all(3)
    save(tmp_path / "a", model)

    def draw():
        return [torch.rand(()).item(), np.random.rand(), random.random(), np.random.randn()]

    expected = draw()
    draw()
    load(tmp_path / "a", model)
    assert draw() == expected
    load(tmp_path / "a", model, random_state=False)
    assert draw() != expected


def test_a_checkpoint_holds_each_expert_once_and_not_the_pool(tmp_path):
    model = MoE(64, FFN(64), 16, seed=0)
    model(torch.randn(8, 64))
    save(tmp_path / "a", model)
    held = sum(v.nbytes for v in model.state_dict().values() if isinstance(v, torch.Tensor))
    assert (tmp_path / "a").stat().st_size < 1.5 * held


def test_a_checkpoint_is_readable_without_growmoe(tmp_path):
    model, optimizer = small()
    save(tmp_path / "a", model, optimizer)
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        names = list(file.keys())
        json.loads(file.metadata()["content"])
        assert np.array_equal(
            file.get_tensor("/model/experts.0.body.w_in"),
            model.experts[0].body.w_in.detach().numpy(),
        )
    assert any("optimizers" in name for name in names)


def test_an_average_goes_through_extra(tmp_path):
    model, _ = small()
    average = EMA(model, 0.5)
    surgery.spawn(model, 0, _)
    average.update()
    save(tmp_path / "a", model, _, extra={"ema": average.state_dict()})
    other, trainer = small()
    again = EMA(other, 0.5)
    again.load_state_dict(load(tmp_path / "a", other, trainer)["ema"])
    assert differences(copied(average.average), copied(again.average)) == []
