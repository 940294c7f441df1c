"""Prune a checkpoint larger than memory: layer by layer, then tensor by tensor.

What is done is kept in a hidden folder beside the output, so that the same command goes on after
an interruption; the output appears whole at the end, and the hidden folder goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from growmoe.compress import criteria
from growmoe.compress.choose import Progress
from growmoe.compress.layer import CompressError
from growmoe.compress.measure import changes
from growmoe.compress.options import Options
from growmoe.compress.plan import LayerSize, Plan, make_plan, uniform_budget
from growmoe.compress.report import LayerReport, Report, peak_memory
from growmoe.compress.statistics import LayerStatistics
from growmoe.compress.text import Texts
from growmoe.hf.anonymous import Peak
from growmoe.hf.cutting import cuts_of
from growmoe.hf.folder import copy_small_files, read_config
from growmoe.hf.shards import INDEX, Checkpoint, settle, write_cut, write_index
from growmoe.hf.skeleton import Skeleton, hidden_file
from growmoe.hf.work import Work

CRITERIA = ("frequency", "gate-mass", "ean", "man", "msan", "reap", "aimer", "random")


def why_not(options: Options) -> str | None:
    """Why this cannot be done layer by layer; None if it can."""
    if options.act != "prune":
        return "merging looks at a whole model"
    if options.saliency not in CRITERIA:
        return f"{options.saliency} looks at a whole model (not so {', '.join(CRITERIA)})"
    if options.max_loss is not None or options.per_layer != "uniform":
        return "only --ratio and --keep, the same for each layer, need no whole model"
    if options.match or options.recover or options.router_steps:
        return "training and least squares need a whole model"
    return None


def prune_streaming(options: Options, texts: Texts, progress: Progress) -> Report:
    """Prune a folder into a new one, with one decoder layer in memory at a time.

    Raises:
        CompressError: it cannot be done; what was done stays in the hidden folder if going on is
            possible.
    """
    reason = why_not(options)
    if reason is not None:
        raise CompressError(f"not by streaming: {reason}")
    with Peak() as peak:
        checkpoint = Checkpoint(options.model)
        skeleton = Skeleton(checkpoint, read_config(options.model))
        sizes = _sizes(skeleton)
        uniform_budget(sizes, options.ratio, options.keep)  # refused before anything is computed
        work = Work(options, checkpoint, peak)
        try:
            return _prune(skeleton, sizes, work, options, texts, progress)
        except OSError as error:
            raise CompressError(
                f"cannot write {error.filename or work.folder}: {error.strerror or error}; what "
                f"was done is in {work.folder}: make room and run the same command again, or "
                "remove it"
            ) from error
        except CompressError:
            if "before" not in work.told:  # there is nothing to go on from
                shutil.rmtree(work.folder)
            raise


def _prune(
    skeleton: Skeleton,
    sizes: Mapping[str, LayerSize],
    work: Work,
    options: Options,
    texts: Texts,
    progress: Progress,
) -> Report:
    tokens, ends = _sequences(texts)
    before = _pass(
        "before", skeleton, work, tokens, options, ends["(calibration)"],
        lambda part, text: progress(0.5 * part, text),
    )  # fmt: skip
    plan, values, statistics, spared = _plan(skeleton, work, sizes, options)
    _write_model(skeleton, work, plan, lambda part, text: progress(0.5 + 0.1 * part, text))
    small = Skeleton(Checkpoint(work.model), read_config(work.model))
    after = _pass(
        "after", small, work, tokens, options, 0,
        lambda part, text: progress(0.6 + 0.4 * part, text),
    )  # fmt: skip
    work.keep()
    report = Report(
        act="prune",
        settings={
            "saliency": options.saliency,
            "ratio": options.ratio,
            "keep": options.keep,
            "max_loss": None,
            "per_layer": "uniform",
            "guard": options.guard,
            "match": False,
            "novices": False,
            "seed": options.seed,
        },
        layers=[
            LayerReport(
                name=name,
                experts_before=len(size.ids),
                experts_after=plan.left(name),
                removed=plan.remove[name],
                reasons=plan.reasons[name],
                saliency=dict(enumerate(values[name].tolist())),
                load=dict(enumerate(statistics[name].count.tolist())),
                spared=list(spared.get(name, [])),
            )
            for name, size in sizes.items()
        ],
        domains=changes(_by_domain(before, ends), _by_domain(after, ends)),
        parameters_before=skeleton.parameters,
        parameters_after=small.parameters,
        seconds=work.told["seconds"],
        peak_memory=peak_memory(),
        model={
            "path": str(options.model),
            "kind": skeleton.config.model_type,
            "command": options.command,
            "streaming": True,
            "checkpoint_bytes": skeleton.checkpoint.bytes,
            "peak_anonymous_bytes": work.told["peak"],
            "runs": work.told["runs"],
            "left_out": work.told.get("extra", []),
        },
    )
    report.write(work.model)
    work.finish()
    return report


def _sizes(skeleton: Skeleton) -> dict[str, LayerSize]:
    family, config = skeleton.family, skeleton.config
    number = int(getattr(config, family.count))
    size = LayerSize(
        tuple(range(number)), family.fewest(config), family.groups_of(config)[0], uniform=True
    )
    return dict.fromkeys(skeleton.blocks.values(), size)


def _sequences(texts: Texts) -> tuple[Tensor, dict[str, int]]:
    """All sequences of equal length, those of calibration first, and where each domain ends."""
    domains = {"(calibration)": texts.calibration, **texts.evaluation}
    parts, ends, end = [], {}, 0
    for name, batches in domains.items():
        parts += batches
        end += sum(map(len, batches))
        ends[name] = end
    return torch.cat(parts), ends


def _by_domain(loss_N: Tensor, ends: Mapping[str, int]) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, end in ends.items():
        found[name], start = loss_N[start:end], end
    return found


def _pass(
    name: str,
    skeleton: Skeleton,
    work: Work,
    token_NS1: Tensor,
    options: Options,
    calibration: int,
    progress: Progress,
) -> Tensor:
    """All sequences through all layers: the loss of each, float64 [N].

    The statistics of the mixtures over the first `calibration` sequences are stored on the way.
    """
    done = work.told.get(name, {"layers": 0})
    if "losses" in done:
        return torch.tensor(done["losses"], dtype=torch.float64)
    token_NS = token_NS1[:, :-1]
    size = options.batch_size
    shape = (*token_NS.shape, skeleton.config.hidden_size)
    paths = [work.folder / f"hidden-{name}-{i}" for i in (0, 1)]
    hidden = [hidden_file(path, shape, skeleton.dtype) for path in paths]
    number = len(skeleton.layers)
    if not done["layers"]:
        skeleton.embed(token_NS, hidden[0], size)
    for i in range(done["layers"], number):
        progress(i / number, f"layer {i + 1} of {number}")
        with skeleton.loaded(i):
            statistics = None
            if i in skeleton.blocks and calibration:
                block = skeleton.block(i)
                statistics = LayerStatistics(block.count, samples=0)
                stored = {}
                if options.saliency == "aimer":
                    bodies = [block.ffn(id) for id in block.ids]
                    stored["aimer"] = criteria.aimer(bodies)
            listener = None if statistics is None else statistics.add
            source, target = hidden[i % 2], hidden[(i + 1) % 2]
            skeleton.through(i, token_NS, source, target, size, listener, calibration)
        settle(paths[(i + 1) % 2])
        if statistics is not None:
            work.store(f"statistics-{i}.safetensors", statistics.state() | stored)
        work.keep(**{name: {"layers": i + 1}})
    losses = skeleton.losses(token_NS1, hidden[number % 2])
    if not bool(losses.isfinite().all()):
        raise CompressError("the loss is not finite")
    work.keep(**{name: {"layers": number, "losses": losses.tolist()}})
    del hidden
    for path in paths:
        path.unlink()
    return losses


def _plan(
    skeleton: Skeleton, work: Work, sizes: Mapping[str, LayerSize], options: Options
) -> tuple[Plan, dict[str, Tensor], dict[str, LayerStatistics], dict[str, list[int]]]:
    statistics, values = {}, {}
    generator = torch.Generator().manual_seed(options.seed)
    for i, name in skeleton.blocks.items():
        state = load_file(work.folder / f"statistics-{i}.safetensors")
        statistics[name] = LayerStatistics.from_state(state)
        if options.saliency == "aimer":
            values[name] = state["aimer"]
        elif options.saliency == "random":
            values[name] = criteria.random(len(sizes[name].ids), generator)
        else:
            values[name] = criteria.FROM_STATISTICS[options.saliency](statistics[name])
    spared = criteria.super_experts(statistics) if options.guard else {}
    plan = make_plan(values, sizes, ratio=options.ratio, keep=options.keep, spared=spared)
    return plan, values, statistics, spared


def _write_model(skeleton: Skeleton, work: Work, plan: Plan, progress: Progress) -> None:
    """Copy the checkpoint file by file, without what the plan removes."""
    checkpoint, family, config = skeleton.checkpoint, skeleton.family, skeleton.config
    keep = {
        i: [id for id in plan.sizes[name].ids if id not in plan.remove[name]]
        for i, name in skeleton.blocks.items()
    }
    cuts, extra = cuts_of(checkpoint, family, config, keep)
    work.model.mkdir(exist_ok=True)
    held: dict[str, list[str]] = {}
    done = 0
    for file in checkpoint.files:
        inside = [name for name, entry in checkpoint.entries.items() if entry.file == file]
        target = work.model / file.name
        held[file.name] = [cuts[name].name for name in inside if name in cuts]
        if not held[file.name]:
            del held[file.name]
        elif not target.is_file():  # it is there only if it is whole

            def count(size: int) -> None:
                nonlocal done
                done += size
                progress(min(1.0, done / checkpoint.bytes), "writing")

            write_cut(checkpoint, inside, cuts, target, count)
    if len(held) > 1 or (checkpoint.folder / INDEX).is_file():
        write_index(work.model, held)
    small = type(config).from_dict(config.to_dict())
    setattr(small, family.count, len(next(iter(keep.values()))))
    if extra and hasattr(small, "num_nextn_predict_layers"):
        small.num_nextn_predict_layers = 0
    small.save_pretrained(work.model)
    copy_small_files(checkpoint.folder, work.model)
    work.keep(extra=extra)


def streams(options: Options, available: int) -> bool:
    """Whether to go layer by layer: as asked, or if the model would take half of what is free."""
    if options.streaming is not None:
        return options.streaming
    if why_not(options) is not None or not _has_weights(options.model):
        return False
    return Checkpoint(options.model).bytes > available / 2


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / "model.safetensors").is_file()


def available_bytes() -> int:
    """Memory that is free, or would be if caches went; very much where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 60
