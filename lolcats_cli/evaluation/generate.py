"""generate: text from a model, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lolcats_cli.errors import BadInput, LolcatsError, UsageError
from lolcats_cli.loading.any_model import Loaded
from lolcats_cli.teacher.load import first_line


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
        BadInput: the model's predictions are no numbers, or its generation_config.json cannot be followed.
    """
    from transformers import LogitsProcessorList, TextStreamer

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
    try:
        model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.eos_token_id if pad is None else pad,
            streamer=Stream(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            logits_processor=LogitsProcessorList([_check_numbers]),
        )
    except (LolcatsError, OSError):
        raise
    except Exception as error:  # of every sort, as settings of a wrong type or size meet all of transformers
        raise BadInput(f"{type(model).__name__} cannot generate as its folder says: {first_line(error)}") from error
    return "".join(pieces)


def _check_numbers(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores [B, V] of the next token as they are. Raises `BadInput` if they are no numbers; -inf rules one out."""
    if bool(scores.isnan().any()) or bool((scores == torch.inf).any()):
        raise BadInput("The model predicts NaN or infinity: its weights are damaged, or overflow in this --dtype.")
    return scores
