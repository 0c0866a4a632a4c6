"""generate: text from a model, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lolcats_cli.errors import UsageError
from lolcats_cli.stages.models import Loaded


def generate(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    write: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue `prompt`; `write` gets the continuation piece by piece, and the whole is returned.

    Args:
        temperature: 0 takes the likeliest token every time.
        seed: draws the tokens otherwise.

    Raises:
        UsageError: the prompt has no tokens.
    """
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)
            pieces.append(text)

    pieces: list[str] = []
    model: Any = loaded.model
    torch.manual_seed(seed)
    inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("--prompt is empty; give the text to continue.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = loaded.tokenizer.pad_token_id
    model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=loaded.tokenizer.eos_token_id if pad is None else pad,
        streamer=Stream(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return "".join(pieces)
