"""Text that a model continues, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from growmoe.lm.domains import Domain
from growmoe.lm.tokenizer import Tokenizer
from growmoe.routers.gate import ContextMissing


def sample_text(
    model: Any,
    domains: Mapping[str, Domain],
    tokenizer: Tokenizer,
    *,
    prompt: int = 64,
    length: int = 256,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The model's continuation of the middle of each domain's test part.

    Args:
        model: with `generate`, as `growmoe.models.TransformerLM` has it.
        prompt, length: tokens given and tokens drawn.
    """
    device = next(model.parameters()).device
    sections = []
    for name, domain in domains.items():
        middle = len(domain.test) // 2
        token_1S = domain.test[middle : middle + prompt].long()[None].to(device)
        generator = torch.Generator().manual_seed(seed)
        try:
            token_1S = model.generate(token_1S, length, temperature, generator=generator)
            given, drawn = token_1S[0, :prompt].tolist(), token_1S[0, prompt:].tolist()
            text = f"{tokenizer.decode(given)}⟫{tokenizer.decode(drawn)}"
        except ContextMissing as error:
            text = f"(nothing: {error})"
        printable = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
        sections.append(f"━━ {name}: given before ⟫, drawn after it\n{printable}\n")
    return "\n".join(sections)
