"""Runs a student and its teacher for a report: perplexity, recall, samples, and decoding speed."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lolcats_formats import Artifact
from lolcats_kernels.hf_cache import CACHE_NAME
from lolcats_kernels.hf_student import execution_device

from lolcats_cli.errors import LolcatsError
from lolcats_cli.evaluation.evaluate import evaluate
from lolcats_cli.evaluation.generate import generate
from lolcats_cli.loading.any_model import Loaded, load_any
from lolcats_cli.loading.student import teacher_folder
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.data import read_rows
from lolcats_cli.teacher.load import LoadOptions, model_limit
from lolcats_cli.teacher.records import DataOptions

PROMPT_TOKENS, SAMPLE_TOKENS = 64, 80
CONTEXTS = (128, 1024)  # in front of the tokens that are timed
TIMED_TOKENS = 24


@dataclass
class Measured:
    """What was measured on held-out data.

    Attributes:
        data: where it came from; `rows` and `tokens` of it were read.
        results: figures of `evaluate` by the model's name; a student's also with one term of its attention alone.
        prompt: the beginning of the data, which the `samples` of each model continue.
        speed: tokens per second of one sequence by model and tokens in front of them.
        device: what it ran on.
        without_teacher: why there are no figures of the teacher; None if there are.
    """

    data: Sequence[str]
    rows: int = 0
    tokens: int = 0
    prompt: str = ""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    speed: dict[str, dict[int, float]] = field(default_factory=dict)
    device: str = ""
    without_teacher: str | None = None


def measure(
    artifact: Artifact,
    data: Sequence[str],
    *,
    options: DataOptions = DataOptions(),
    recall_count: int = 32,
    batch_size: int = 4,
    teacher: str | None = None,
    load: LoadOptions = LoadOptions(),
    seed: int = 0,
    progress: Progress = Progress(),
) -> Measured:
    """Runs the student on the data, and then its teacher if it is there.

    Args:
        artifact: a transfer, a LoRA or a merged student.
        teacher: the teacher's folder. If it is given, it must hold the right teacher. If it is not given, and the
            recorded folder is missing, the teacher is left out.

    Raises:
        BadInput: the data cannot be used, or a model predicts no numbers.
        IdentityMismatch: `teacher` is another model.
    """
    found = Measured(data)
    models = {"student": str(artifact.path)}
    try:
        models["teacher"] = str(teacher_folder(artifact, teacher))
    except (LolcatsError, OSError) as error:
        if teacher is not None or artifact.kind != "student":
            raise
        found.without_teacher = str(error)
    for name, path in models.items():
        progress.note(f"loading the {name} from {path}")
        loaded = load_any(path, load, teacher=teacher if name == "student" else None)
        _measure(found, name, loaded, options, recall_count, batch_size, seed, progress)
        del loaded
        gc.collect()  # before the next is loaded
    return found


def _measure(
    found: Measured,
    name: str,
    loaded: Loaded,
    options: DataOptions,
    recall_count: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> None:
    figures = evaluate(
        loaded,
        found.data,
        options=options,
        batch_size=batch_size,
        recall_count=recall_count,
        seed=seed,
        progress=progress,
    )
    found.rows, found.tokens = figures["rows"], figures["tokens"]
    alone = {"window": "linear term zeroed", "linear": "window zeroed"}
    for term, result in figures["results"].items():
        found.results[f"{name}, {alone[term]}" if term in alone else name] = result
    if not found.prompt:
        rows = read_rows(found.data, loaded.tokenizer, options)
        real = rows.input_ids[0] if rows.valid is None else rows.input_ids[0][rows.valid[0]]
        found.prompt = str(loaded.tokenizer.decode(real[:PROMPT_TOKENS].tolist(), skip_special_tokens=True)).strip()
    progress.note(f"{name}: a sample, and the speed of decoding")
    found.samples[name] = generate(loaded, found.prompt, max_new_tokens=SAMPLE_TOKENS)
    limit = model_limit(loaded.model.config)
    contexts = [context for context in CONTEXTS if limit is None or context + TIMED_TOKENS <= limit]
    found.speed[name] = {context: decoding_speed(loaded, context) for context in contexts}
    found.device = str(execution_device(loaded.model))


@torch.no_grad()
def decoding_speed(loaded: Loaded, context: int) -> float:
    """Tokens per second of one sequence behind `context` tokens. The first new token is not counted."""
    model: Any = loaded.model
    device = execution_device(model)
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    out = model(input_ids=torch.randint(vocab, (1, context), generator=generator).to(device), use_cache=True)
    started = 0.0
    for step in range(TIMED_TOKENS + 1):
        if step == 1:
            out.logits[0, -1, 0].item()  # waits for the device
            started = time.perf_counter()
        following = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=following, use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
    out.logits[0, -1, 0].item()
    return TIMED_TOKENS / (time.perf_counter() - started)
