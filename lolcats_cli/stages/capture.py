"""capture: what a teacher's attentions see on some data, kept on disk.

The artifact holds `tokens/{train,validation}.safetensors` (`input_ids` [N, T], and `valid` [N, T] for padded rows) and,
per layer and group of rows, `layers/LLL/{split}-GGGGG.safetensors` with q [n, H, T, D] and k, v [n, K, T, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.writer import Resume
from torch import Tensor

from lolcats_cli import __version__, stopping
from lolcats_cli.errors import BadInput
from lolcats_cli.progress import Progress
from lolcats_cli.stages.disk import check_space
from lolcats_cli.student.build import check_servable
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.attention import AttentionSpec
from lolcats_cli.teacher.data import DataOptions, Rows, describe_rows, read_rows, split_rows
from lolcats_cli.teacher.load import (
    LoadOptions,
    load_model,
    load_tokenizer,
    longrope_limit,
    model_limit,
    resolve_folder,
)
from lolcats_cli.teacher.record import LayerInfo, probe, recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 256 * 2**20  # of one layer's shard
GROUP_BYTES = 2 * 2**30  # of one group of rows over all layers, held in memory until it is written
SPLITS = ("train", "validation")
ADVICE = "Take fewer --samples, a smaller --dtype, or another disk."


def capture(
    teacher: str,
    data: str,
    output: Path | str,
    *,
    options: DataOptions = DataOptions(),
    load: LoadOptions = LoadOptions(),
    revision: str | None = None,
    val_fraction: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Run the teacher over the data and keep tokens, q, k and v. Running it again resumes.

    Args:
        teacher: a model folder, or a hub id (with `revision`).
        data: a file, "-" for stdin, or a hub dataset id.
        output: the artifact's directory.
        val_fraction: the part of the rows kept for validation, at least one row.
        batch_size: rows per forward pass.
        seed: draws the validation rows.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        BadInput: a teacher or data that cannot be used, including attentions that cannot be recorded.
        NotEnoughSpace: the disk lacks the bytes that the capture will take.
    """
    folder = resolve_folder(teacher, revision)
    config = _auto_config(folder, load)
    limit, short = model_limit(config), longrope_limit(config)
    if limit is not None and options.seq_len > limit:
        raise BadInput(f"--seq-len {options.seq_len} is over the {limit} tokens that {teacher} was made for.")
    if short is not None and options.seq_len > short:
        raise BadInput(
            f"--seq-len {options.seq_len} is over the {short} tokens beyond which {teacher} rotates by other factors "
            "(longrope). Its student keeps those of short sequences at any length: capture shorter ones."
        )
    tokenizer = load_tokenizer(folder, load.trust_remote_code)
    rows = dict(zip(SPLITS, split_rows(read_rows(data, tokenizer, options), val_fraction, seed), strict=True))
    model = load_model(folder, load)
    layers = probe(model)
    check_servable(model)
    progress.note(f"{teacher}: {len(layers)} attention layers, every one recorded and reproduced")
    per_row = options.seq_len * sum(layer.bytes_per_token(model.dtype) for layer in layers)
    total = sum(map(len, rows.values()))
    if not any((Path(output) / name).exists() for name in ("manifest.json", "progress.json")):
        check_space(total * per_row, output, ADVICE)  # before the directory is bound to these options

    with ArtifactWriter.create(
        output,
        "capture",
        config={
            "data": {key: value for key, value in asdict(options).items() if key not in ("first", "samples")},
            "samples": [options.first, options.first + total - 1],
            "dtype": str(model.dtype).removeprefix("torch."),
            "val_fraction": val_fraction,
            "seed": seed,
        },
        teacher=describe_teacher(model, folder, revision, layers),
        data=describe_rows(rows, data),
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        counts = {split: len(rows[split]) for split in SPLITS}
        groups = list(row_groups(counts, options.seq_len, layers, model.dtype))
        todo = [group for group in groups if not all(writer.has(shard_name(i, *group[:2])) for i in range(len(layers)))]
        needed = sum(len(group[2]) for group in todo) * per_row
        space = check_space(needed, output, ADVICE)
        progress.note(f"capture will write {space}")
        for split in SPLITS:
            if not writer.has(f"tokens/{split}.safetensors"):
                writer.save(f"tokens/{split}.safetensors", rows[split].to_tensors())
        with progress.task("capture", total, "rows") as advance:
            advance(total - sum(len(group[2]) for group in todo))
            for split, number, index in todo:
                recorded = _record(model, rows[split].select(index), batch_size)
                with stopping.deferred():  # to write takes less than to record
                    for layer, tensors in recorded.items():
                        if not writer.has(shard_name(layer, split, number)):
                            writer.save(shard_name(layer, split, number), tensors)
                stopping.check()
                advance(len(index))
        return writer.finish({"bytes": total * per_row})


def _auto_config(folder: Path, load: LoadOptions):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=load.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"transformers cannot read the configuration in {folder}: {reason}") from error


def describe_teacher(
    model: PreTrainedModel, folder: Path, revision: str | None, layers: list[LayerInfo]
) -> dict[str, Any]:
    """What an artifact says of its teacher: where it lay, its identity, its layers."""
    config = model.config.get_text_config()
    return {
        "path": str(folder),
        "revision": revision,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        **identity.identify(folder),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(layers),
        "layers": [layer.to_dict() for layer in layers],
    }


def row_groups(
    counts: dict[str, int], seq_len: int, layers: list[LayerInfo], dtype: torch.dtype
) -> Iterator[tuple[str, int, Tensor]]:
    """(split, number, rows of the split) of each group that is computed together and becomes one shard per layer."""
    per_token = [layer.bytes_per_token(dtype) for layer in layers]
    size = max(1, min(SHARD_BYTES // (max(per_token) * seq_len), GROUP_BYTES // (sum(per_token) * seq_len)))
    for split, count in counts.items():
        for number, start in enumerate(range(0, count, size)):
            yield split, number, torch.arange(start, min(start + size, count))


def shard_name(layer: int, split: str, number: int) -> str:
    return f"layers/{layer:03d}/{split}-{number:05d}.safetensors"


@torch.no_grad()
def _record(model: PreTrainedModel, rows: Rows, batch_size: int) -> dict[int, dict[str, Tensor]]:
    """q, k and v of every layer for these rows, on the CPU."""
    parts: dict[int, list[tuple[Tensor, ...]]] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
        parts.setdefault(layer, []).append((q.cpu(), k.cpu(), v.cpu()))

    with recording(model, keep):
        for start in range(0, len(rows), batch_size):
            batch = rows.select(torch.arange(start, min(start + batch_size, len(rows))))
            mask = None if batch.valid is None else batch.valid.long().to(model.device)
            model.base_model(input_ids=batch.input_ids.long().to(model.device), attention_mask=mask, use_cache=False)
    return {
        layer: {
            name: torch.cat(tensors).contiguous()
            for name, tensors in zip("qkv", zip(*chunks, strict=True), strict=True)
        }
        for layer, chunks in sorted(parts.items())
    }
