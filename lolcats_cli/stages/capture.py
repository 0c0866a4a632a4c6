"""capture: what a teacher's attentions see on some data, kept on disk.

The artifact holds `tokens/{train,validation}.safetensors` (`input_ids` [N, T], and `valid` [N, T] for padded rows) and,
per layer and group of rows, `layers/LLL/{split}-GGGGG.safetensors` with q [n, H, T, D] and k, v [n, K, T, D]. Beside
them, per group, `statistics/{split}-GGGGG.safetensors` with `entropy.LLL` and `esl.LLL` [n, H] (see
`attention_statistics`). Of rows selected by their ESL, `candidates/GGGGG.safetensors` keeps the `esl` [n] of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.writer import Resume
from safetensors.torch import load_file
from torch import Tensor

from lolcats_cli import __version__, stopping
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.stages.disk import check_space
from lolcats_cli.student.build import check_servable
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.attention import AttentionSpec
from lolcats_cli.teacher.data import DataOptions, Rows, describe_rows, read_rows, split_numbers, split_rows
from lolcats_cli.teacher.load import (
    LoadOptions,
    load_model,
    load_tokenizer,
    longrope_limit,
    model_limit,
    resolve_folder,
)
from lolcats_cli.teacher.record import LayerInfo, probe, recording
from lolcats_cli.teacher.statistics import attention_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 256 * 2**20  # of one layer's shard
GROUP_BYTES = 2 * 2**30  # of one group of rows over all layers, held in memory until it is written
CANDIDATES = 64  # rows of one file of candidates: what is done again after a crash
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
    keep: int | None = None,
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
        keep: of the data's rows, take so many with the largest ESL, averaged over heads and layers, in their order.
        val_fraction: the part of the rows kept for validation, at least one row.
        batch_size: rows per forward pass.
        seed: draws the validation rows.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        BadInput: a teacher or data that cannot be used, including attentions that cannot be recorded.
        UsageError: more rows to `keep` than there are.
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
    found = read_rows(data, tokenizer, options)
    if keep is not None and keep > len(found):
        raise UsageError(f"--keep {keep} is more than the {len(found)} rows that {data} gives. Keep fewer.")
    model = load_model(folder, load)
    layers = probe(model)
    check_servable(model)
    progress.note(f"{teacher}: {len(layers)} attention layers, every one recorded and reproduced")
    per_row = options.seq_len * sum(layer.bytes_per_token(model.dtype) for layer in layers)
    total = len(found) if keep is None else keep
    if not any((Path(output) / name).exists() for name in ("manifest.json", "progress.json")):
        check_space(total * per_row, output, ADVICE)  # before the directory is bound to these options

    with ArtifactWriter.create(
        output,
        "capture",
        config={
            "data": {key: value for key, value in asdict(options).items() if key not in ("first", "samples")},
            "samples": [options.first, options.first + len(found) - 1],
            **({} if keep is None else {"select": "top-esl", "keep": keep}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "val_fraction": val_fraction,
            "seed": seed,
        },
        teacher=describe_teacher(model, folder, revision, layers),
        data=_describe_data(found, data, keep, val_fraction, seed),
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        if keep is not None:
            found = found.select(_longest(model, found, keep, batch_size, writer, progress))
        rows = dict(zip(SPLITS, split_rows(found, val_fraction, seed), strict=True))
        counts = {split: len(rows[split]) for split in SPLITS}
        groups = list(row_groups(counts, options.seq_len, layers, model.dtype))
        todo = [group for group in groups if not all(map(writer.has, group_files(*group[:2], len(layers))))]
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
                    for name, tensors in zip(group_files(split, number, len(layers)), recorded, strict=True):
                        if not writer.has(name):
                            writer.save(name, tensors)
                stopping.check()
                advance(len(index))
        statistics = summarize([writer.path / group_files(*group[:2], 0)[0] for group in groups], found.tokens)
        return writer.finish({"bytes": total * per_row, "layers": statistics})


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


def group_files(split: str, number: int, layers: int) -> list[str]:
    """The files of a group of rows: its statistics, and a shard per layer."""
    return [
        f"statistics/{split}-{number:05d}.safetensors",
        *(shard_name(layer, split, number) for layer in range(layers)),
    ]


def summarize(files: list[Path], tokens: int) -> dict[str, dict[str, Any]]:
    """Of every layer, from the statistics of all rows: a query's `entropy` in nats, also by head, and a row's `esl`."""
    parts = [load_file(file) for file in files]
    layers = sorted(name.partition(".")[2] for name in parts[0] if name.startswith("esl."))
    summary = {}
    for layer in layers:
        entropy, esl = (torch.cat([part[f"{x}.{layer}"] for part in parts]).double() for x in ("entropy", "esl"))
        heads = entropy.sum(0) / tokens
        summary[str(int(layer))] = {
            "entropy": heads.mean().item(),
            "head_entropy": heads.tolist(),
            "esl": esl.mean().item(),
        }
    return summary


def _describe_data(found: Rows, path: str, keep: int | None, val_fraction: float, seed: int) -> dict[str, Any]:
    """The identity of the rows; of rows that are still to be selected, that of the candidates."""
    if keep is None:
        return describe_rows(dict(zip(SPLITS, split_rows(found, val_fraction, seed), strict=True)), path)
    kept = dict(zip(SPLITS, map(len, split_numbers(keep, val_fraction, seed)), strict=True))
    return {**describe_rows({"candidates": found}, path), "rows": kept}


def _longest(
    model: PreTrainedModel, rows: Rows, keep: int, batch_size: int, writer: ArtifactWriter, progress: Progress
) -> Tensor:
    """The numbers of the rows with the largest ESL, in order; of equals the earlier ones."""
    esl = []
    with progress.task("select", len(rows), "rows") as advance:
        for number, index in enumerate(torch.arange(len(rows)).split(CANDIDATES)):
            name = f"candidates/{number:05d}.safetensors"
            if not writer.has(name):
                statistics, *_ = _record(model, rows.select(index), batch_size, activations=False)
                # The heads of a layer are averaged before the layers are, as layers may differ in heads.
                layers = [figure.double().mean(1) for key, figure in statistics.items() if key.startswith("esl.")]
                writer.save(name, {"esl": torch.stack(layers).mean(0)})
            esl.append(load_file(writer.path / name)["esl"])
            advance(len(index))
    return torch.cat(esl).argsort(descending=True, stable=True)[:keep].sort().values


@torch.no_grad()
def _record(model: PreTrainedModel, rows: Rows, batch_size: int, activations: bool = True) -> list[dict[str, Tensor]]:
    """What a group's files hold (see `group_files`), on the CPU: the rows' statistics, then q, k and v of every layer
    if `activations`."""
    statistics: dict[str, list[Tensor]] = {}
    layers: dict[int, list[tuple[Tensor, ...]]] = {}
    valid: Tensor | None = None

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
        if activations:
            layers.setdefault(layer, []).append((q.cpu(), k.cpu(), v.cpu()))
        for row in range(len(q)):  # alone, so that its figures do not depend on the rows beside it
            figures = attention_statistics(q[row], k[row], spec, None if valid is None else valid[row])
            for name, figure in zip(("entropy", "esl"), figures, strict=True):
                statistics.setdefault(f"{name}.{layer:03d}", []).append(figure.cpu())

    with recording(model, keep):
        for start in range(0, len(rows), batch_size):
            batch = rows.select(torch.arange(start, min(start + batch_size, len(rows))))
            valid = None if batch.valid is None else batch.valid.to(model.device)
            mask = None if valid is None else valid.long()
            model.base_model(input_ids=batch.input_ids.long().to(model.device), attention_mask=mask, use_cache=False)
    return [
        {name: torch.stack(figures) for name, figures in statistics.items()},
        *(
            {name: torch.cat(parts).contiguous() for name, parts in zip("qkv", zip(*chunks, strict=True), strict=True)}
            for _, chunks in sorted(layers.items())
        ),
    ]
