"""generate: streams the text that a model writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from lolcats_cli.errors import BadInput, LolcatsError, UsageError
from lolcats_cli.loading.any_model import NO_NUMBERS, Loaded
from lolcats_cli.teacher.load import first_line


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: with 0, the likeliest token is taken every time, and the other attributes have no effect.
        top_p: tokens are drawn from the likeliest ones that together have this probability; 1 means all.
        top_k: tokens are drawn from this number of the likeliest ones; 0 means all. Where `top_p` or `top_k` is None,
            the model's generation_config.json decides.
        seed: the seed of the draws.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True} | {name: value for name, value in given.items() if value is not None}


def generate(
    loaded: Loaded,
    prompt: str | list[dict[str, str]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    write: Callable[[str], None] = lambda text: None,
) -> str:
    """Continues `prompt`. `write` gets the continuation piece by piece, and the whole continuation is returned.

    Args:
        prompt: a text, or the turns of a conversation (`role` and `content`), for the tokenizer's chat template.

    Raises:
        UsageError: the prompt has no tokens, or the tokenizer has no chat template.
        BadInput: the model predicts NaN or infinity, or its generation_config.json cannot be followed.
    """
    from transformers import LogitsProcessorList, TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)
            pieces.append(text)

    pieces: list[str] = []
    model: Any = loaded.model
    torch.manual_seed(sampling.seed)
    inputs = _encode(loaded, prompt).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("The prompt is empty. Give the text to continue.")
    pad = loaded.tokenizer.pad_token_id
    try:
        model.generate(
            **inputs,
            **sampling.options(),
            max_new_tokens=max_new_tokens,
            # On a GPU a student decodes by a CUDA graph, which needs a cache that keeps its place.
            **({"cache_implementation": "static"} if loaded.layers and model.device.type == "cuda" else {}),
            pad_token_id=loaded.tokenizer.eos_token_id if pad is None else pad,
            streamer=Stream(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            logits_processor=LogitsProcessorList([_check_numbers]),
        )
    except (LolcatsError, OSError):
        raise
    except Exception as error:  # wrong settings may raise anything, as they reach all of transformers
        raise BadInput(
            f"{type(model).__name__} cannot generate with its generation_config.json: {first_line(error)}"
        ) from error
    return "".join(pieces)


def _encode(loaded: Loaded, prompt: str | list[dict[str, str]]) -> BatchEncoding:
    """The prompt as tensors of one row. Raises UsageError for a conversation without a chat template."""
    tokenizer = loaded.tokenizer
    if isinstance(prompt, str):
        encoded: BatchEncoding = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return encoded
    if not tokenizer.chat_template:
        raise UsageError("--chat needs a chat template, and this tokenizer has none. Leave out --chat.")
    try:
        made = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # a template is a program and may raise anything
        raise BadInput(f"The tokenizer's chat template cannot be used: {first_line(error)}") from error
    assert isinstance(made, BatchEncoding)
    return made


def _check_numbers(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores [B, V] of the next token, unchanged. Raises `BadInput` for NaN and infinity; -inf is allowed."""
    if bool(scores.isnan().any()) or bool((scores == torch.inf).any()):
        raise BadInput(NO_NUMBERS)
    return scores
