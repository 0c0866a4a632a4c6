"""eval: measures how good a model is on held-out text, and which part of a student's attention does the work.

Shapes: N rows, B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lolcats_kernels.hf_student import execution_device
from lolcats_kernels.softmax import AttentionSpec, softmax_attention

from lolcats_cli.errors import BadInput
from lolcats_cli.evaluation.recall import recall_accuracy, recall_rows
from lolcats_cli.loading.any_model import NO_NUMBERS, Loaded
from lolcats_cli.progress import Progress
from lolcats_cli.student.build import hybrid_modules, set_terms
from lolcats_cli.teacher.data import Rows, read_rows
from lolcats_cli.teacher.load import check_length, model_limit
from lolcats_cli.teacher.records import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTANCES = (128, 512, 900)
ALL_TERMS = ("both", "window", "linear")


def evaluate(
    loaded: Loaded,
    data: str | Sequence[str],
    *,
    options: DataOptions = DataOptions(),
    terms: Sequence[str] = ALL_TERMS,
    batch_size: int = 4,
    recall_count: int = 64,
    seed: int = 0,
    progress: Progress = Progress(),
) -> dict[str, Any]:
    """Measures perplexity and recall; of a student also the error of its attention, with both terms and each alone.

    Args:
        terms: the parts of a student's attention that are measured: "both" terms, the "window" alone, or the "linear"
            term alone.
        batch_size: rows per forward pass.
        recall_count: rows per recall distance; with 0, recall is not measured.

    Returns:
        {"rows", "tokens", "seq_len", "results": {term: figures}}. A teacher has the term "both" alone. The figures are
        `nats_per_token`, its `standard_error` over rows, `perplexity`, `attention_mse`, `relative_attention_mse`
        (divided by the mean square of the softmax output) and `recall` by distance in tokens.

    Raises:
        BadInput: the data cannot be read or is too short, or the model predicts NaN or infinity.
    """
    limit = model_limit(loaded.model.config)
    check_length(options.seq_len, loaded.model.config, "the model")
    vocab_size = loaded.model.config.get_text_config().vocab_size
    rows = read_rows(data, loaded.tokenizer, options, vocab_size=vocab_size, progress=progress)
    if rows.valid is not None and not bool(rows.valid[:, 1:].any()):
        raise BadInput("No row of the data has two tokens, so there is nothing to predict. Pass longer texts.")
    is_student = loaded.kind != "teacher"
    chosen = terms if is_student else ("both",)
    filler = rows.input_ids.flatten() if rows.valid is None else rows.input_ids[rows.valid]
    questions = {}
    for distance in DISTANCES if recall_count else ():
        try:
            made = recall_rows(loaded.tokenizer, filler.long(), distance=distance, count=recall_count, seed=seed)
        except ValueError as error:
            progress.note(f"Recall at {distance} tokens is not measured: {error}")
            continue
        if limit is None or made.input_ids.shape[1] <= limit:
            questions[distance] = made
    results = {}
    with progress.task("eval", len(chosen) * (len(rows) + len(questions)), "rows") as advance:
        for term in chosen:
            if is_student:
                set_terms(loaded.model, term)
            figures = _text_figures(loaded.model, rows, loaded.layers, batch_size, advance)
            if term == "both" and not math.isfinite(figures["nats_per_token"]):
                raise BadInput(NO_NUMBERS)
            figures["recall"] = {}
            for distance, made in questions.items():
                figures["recall"][str(distance)] = recall_accuracy(loaded.model, made, batch_size)
                advance(1)
            results[term] = figures
    if is_student:
        set_terms(loaded.model, "both")
    return {"rows": len(rows), "tokens": rows.tokens, "seq_len": options.seq_len, "results": results}


@torch.no_grad()
def _text_figures(
    model: PreTrainedModel,
    rows: Rows,
    layers: list[AttentionSpec] | None,
    batch_size: int,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    losses, counts = [], []
    with _attention_error(model, layers) as error:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(torch.arange(start, min(start + batch_size, len(rows))))
            ids = batch.input_ids.long().to(execution_device(model))
            valid = torch.ones_like(ids) if batch.valid is None else batch.valid.long().to(ids.device)
            mask = None if batch.valid is None else valid
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * valid[:, 1:]
            losses += nats.sum(1).double().tolist()
            counts += valid[:, 1:].sum(1).tolist()
            advance(len(ids))
    mean = sum(losses) / sum(counts)
    # This is the standard error of a ratio over rows: rows are independent, and the tokens within a row are not.
    spread = sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    n = len(losses)
    return {
        "nats_per_token": mean,
        "standard_error": math.sqrt(spread * n / (n - 1)) / sum(counts) if n > 1 else None,
        "perplexity": math.exp(mean) if mean < 700 else None,
        "attention_mse": error["squared"] / max(error["count"], 1),
        "relative_attention_mse": error["squared"] / max(error["power"], 1e-30),
    }


@contextmanager
def _attention_error(model: PreTrainedModel, layers: list[AttentionSpec] | None) -> Iterator[dict[str, float]]:
    """While open, sums the difference between each hybrid attention and softmax attention over the same q, k and v."""
    total = {"squared": 0.0, "power": 0.0, "count": 0.0}
    specs = layers or []  # a teacher's attention is its own target

    def add(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        query, key, value, valid, *_ = args
        target = softmax_attention(query, key, value, specs[module.layer_idx], valid).transpose(1, 2).float()
        total["squared"] += (out.float() - target).square().sum(dtype=torch.float64).item()
        total["power"] += target.square().sum(dtype=torch.float64).item()
        total["count"] += target.numel() if valid is None else int(valid.sum()) * target[0, 0].numel()

    handles = [hybrid.register_forward_hook(add) for hybrid in hybrid_modules(model)] if specs else []
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()
