"""Prune a checkpoint larger than what it may use: the most memory, and the time.

A sharded Mixtral-like checkpoint of random bfloat16 weights is made, and `growmoe prune` removes
half of its experts by streaming, in a process of its own whose anonymous memory (RssAnon) is
watched from outside. What it says itself in report.json stands beside that.

    python benchmarks/streaming_prune.py --work /tmp/streaming --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HIDDEN, FFN, EXPERTS, HEADS, VOCABULARY = 1024, 2048, 16, 16, 259
TEXT = "".join(f"The {n}th of these lines differs from the {n - 1}th.\n" for n in range(4000))


def make(folder: Path, layers: int, layers_per_file: int = 2) -> None:
    """Write the checkpoint, a few layers at a time."""
    folder.mkdir(parents=True)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if shape not in drawn:  # each is drawn once, and then moved along: that is faster
            drawn[shape] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        drawn[shape] = drawn[shape].roll(1, 0)
        return (drawn[shape] * scale).bfloat16()

    def layer(i: int) -> dict[str, torch.Tensor]:
        start, kv = f"model.layers.{i}.", HIDDEN // 4
        found = {
            f"{start}self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            f"{start}self_attn.k_proj.weight": weight(kv, HIDDEN),
            f"{start}self_attn.v_proj.weight": weight(kv, HIDDEN),
            f"{start}self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            f"{start}input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{start}post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{start}block_sparse_moe.gate.weight": weight(EXPERTS, HIDDEN, scale=4.0),
        }
        for e in range(EXPERTS):
            expert = f"{start}block_sparse_moe.experts.{e}."
            scale = 0.5 + e / EXPERTS  # experts that differ
            found[f"{expert}w1.weight"] = weight(FFN, HIDDEN, scale=scale)
            found[f"{expert}w3.weight"] = weight(FFN, HIDDEN)
            found[f"{expert}w2.weight"] = weight(HIDDEN, FFN)
        return found

    groups = [range(i, min(layers, i + layers_per_file)) for i in range(0, layers, layers_per_file)]
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        tensors = {name: value for i in group for name, value in layer(i).items()}
        if number == 1:
            tensors["model.embed_tokens.weight"] = weight(VOCABULARY, HIDDEN, scale=HIDDEN**0.5)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
            tensors["lm_head.weight"] = weight(VOCABULARY, HIDDEN)
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def anonymous(pid: int) -> int:
    """RssAnon in bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), 0)


def run(place: Path, samples: int, length: int) -> dict[str, object]:
    command = [
        sys.executable, "-m", "growmoe", "prune", str(place / "model"), "--ratio", "0.5",
        "--calibration", str(place / "text.txt"), "--eval", f"lines={place / 'text.txt'}",
        "--samples", str(samples), "--sequence-length", str(length), "--batch-size", "4",
        "--streaming", "--output", str(place / "pruned"),
    ]  # fmt: skip
    clock, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"growmoe prune ended with code {process.returncode}")
    report = json.loads((place / "pruned" / "report.json").read_text())
    return {
        "seconds": round(time.perf_counter() - clock, 1),
        "peak_anonymous_bytes": peak,
        "peak_anonymous_bytes_in_report": report["model"]["peak_anonymous_bytes"],
        "experts": [report["experts_before"], report["experts_after"]],
        "parameters": [report["parameters_before"], report["parameters_after"]],
        "bytes_after": sum(f.stat().st_size for f in (place / "pruned").glob("*.safetensors")),
        "loss": {name: [d["before"], d["after"]] for name, d in report["domains"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a folder with 8 GB of room, emptied at the end; a checkpoint in it is used",
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--output", type=Path, help="a folder for streaming_prune.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        if not (options.work / "model").exists():
            make(options.work / "model", options.layers)
        index = json.loads((options.work / "model" / "model.safetensors.index.json").read_text())
        (options.work / "text.txt").write_text(TEXT)
        found = {
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, one thread",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "checkpoint_bytes": index["metadata"]["total_size"],
            "layers": options.layers,
            "experts_per_layer": EXPERTS,
            "sequences": [options.samples, options.length],
            **run(options.work, options.samples, options.length),
        }
    finally:
        shutil.rmtree(options.work)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        (options.output / "streaming_prune.json").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
