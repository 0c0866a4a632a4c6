"""capture: what a teacher's attentions see on some data, kept on disk.

The artifact holds the tokens and, by its store, q, k and v of every layer, hidden states, or nothing more
(`stages/layout.py`). Beside them it holds figures of the attention of some rows (see `attention_statistics`). Of rows
selected by their ESL, `candidates/GGGGG.safetensors` keeps the `esl` [n] of all.

The teacher's layers run block by block: all rows pass through a block before the next one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from lolcats_cli.stages.layout import SPLITS, Layout, summarize, tokens_name
from lolcats_cli.stages.mergeable import check_mergeable
from lolcats_cli.stages.units import Statistics, record_units
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.blocks import Run, block
from lolcats_cli.teacher.data import DataOptions, Rows, describe_rows, read_rows, split_numbers, split_rows
from lolcats_cli.teacher.load import (
    LoadOptions,
    load_model,
    load_tokenizer,
    longrope_limit,
    model_limit,
    resolve_folder,
    runs_own_code,
)
from lolcats_cli.teacher.record import LayerInfo, probe, recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = 64  # rows of one file of candidates: what is done again after a crash
ADVICE = "Store less with --store block or --store tokens, take fewer --samples, or another disk."


def capture(
    teacher: str,
    data: str | Sequence[str],
    output: Path | str,
    *,
    options: DataOptions = DataOptions(),
    load: LoadOptions = LoadOptions(),
    store: str = "attention",
    block_size: int = 8,
    statistics: str = "sample",
    revision: str | None = None,
    keep: int | None = None,
    val_fraction: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Run the teacher over the data and keep tokens and activations. Running it again resumes.

    Args:
        teacher: a model folder, or a hub id (with `revision`).
        data: one or several files, folders, patterns, "-" for stdin, or hub dataset ids.
        output: the artifact's directory.
        store: what is kept: "attention", "block" or "tokens" (`stages/layout.py`).
        block_size: the layers of a block, for the store "block".
        statistics: of which rows the attention is measured: "sample" (one in 16) or "all".
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
    check_mergeable(folder)
    config = _auto_config(folder, load)
    _check_length(config, options.seq_len, teacher)
    tokenizer = load_tokenizer(folder, load.trust_remote_code)
    vocab_size = config.get_text_config().vocab_size
    found = read_rows(data, tokenizer, options, vocab_size=vocab_size, progress=progress)
    if keep is not None and keep > len(found):
        raise UsageError(f"--keep {keep} is more than the {len(found)} rows that the data gives. Keep fewer.")
    device = load.resolved_device()
    model = load_model(folder, replace(load, device="cpu"))  # blocks of it are moved when they are run
    whole = range(model.config.get_text_config().num_hidden_layers)
    with block(model, whole, _probe_device(model, device)):
        layers = probe(model)
    progress.note(f"{teacher}: {len(layers)} attention layers, every one recorded and reproduced")
    fields: dict[str, Any] = {
        "config": {
            "data": options.to_config(),
            "samples": [options.first, options.first + len(found) - 1],
            **({} if keep is None else {"select": "top-esl", "keep": keep}),
            **({} if store == "attention" else {"store": store, "batch_size": batch_size}),
            **({"block_size": block_size} if store == "block" else {}),
            **({"statistics": statistics} if statistics == "sample" else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "val_fraction": val_fraction,
            "seed": seed,
        },
        "teacher": describe_teacher(model, folder, revision, layers),
        "data": _describe_data(found, data, keep, val_fraction, seed),
    }
    layout = Layout.of(fields)
    size = sum(fields["data"]["rows"].values()) * layout.row_bytes
    if not any((Path(output) / name).exists() for name in ("manifest.json", "progress.json")):
        check_space(size, output, ADVICE)  # before the directory is bound to these options

    with ArtifactWriter.create(
        output, "capture", **fields, tool=f"lolcats {__version__}", resume=resume, force=force
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        if keep is not None:
            with block(model, whole, device) as run:
                found = found.select(_longest(model, run, found, keep, batch_size, writer, progress))
        rows = dict(zip(SPLITS, split_rows(found, val_fraction, seed), strict=True))
        units = [unit for unit in layout.all_units() if not all(map(writer.has, unit.files))]
        needed = sum(len(unit.rows) * layout.row_file_bytes(layer) for unit in units for layer in unit.activations)
        progress.note(f"capture will write {check_space(needed, output, ADVICE)}")
        for split in SPLITS:
            if not writer.has(tokens_name(split)):
                writer.save(tokens_name(split), rows[split].to_tensors())
        everything = sum(len(unit.rows) for unit in layout.all_units())
        with progress.task("capture", everything, "rows") as advance, stopping.deferred():
            advance(everything - sum(len(unit.rows) for unit in units))
            record_units(model, layout, units, rows, device, batch_size, writer, advance)
        return writer.finish({"bytes": size, "layers": summarize(writer.path, layout, rows)})


def _check_length(config, seq_len: int, teacher: str) -> None:
    limit, short = model_limit(config), longrope_limit(config)
    if limit is not None and seq_len > limit:
        raise BadInput(f"--seq-len {seq_len} is over the {limit} tokens that {teacher} was made for.")
    if short is not None and seq_len > short:
        raise BadInput(
            f"--seq-len {seq_len} is over the {short} tokens beyond which {teacher} rotates by other factors "
            "(longrope). Its student keeps those of short sequences at any length: capture shorter ones."
        )


def _auto_config(folder: Path, load: LoadOptions):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=runs_own_code(folder, load.trust_remote_code))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"transformers cannot read the configuration in {folder}: {reason}") from error


def _probe_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """The device if all of the model fits there, else the CPU."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if sum(p.nbytes for p in model.base_model.parameters()) < 0.9 * free else torch.device("cpu")


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


def _describe_data(
    found: Rows, path: str | Sequence[str], keep: int | None, val_fraction: float, seed: int
) -> dict[str, Any]:
    """The identity of the rows; of rows that are still to be selected, that of the candidates."""
    if keep is None:
        return describe_rows(dict(zip(SPLITS, split_rows(found, val_fraction, seed), strict=True)), path)
    kept = dict(zip(SPLITS, map(len, split_numbers(keep, val_fraction, seed)), strict=True))
    return {**describe_rows({"candidates": found}, path), "rows": kept}


def _longest(
    model: PreTrainedModel,
    run: Run,
    rows: Rows,
    keep: int,
    batch_size: int,
    writer: ArtifactWriter,
    progress: Progress,
) -> Tensor:
    """The numbers of the rows with the largest ESL, in order; of equals the earlier ones."""
    esl = []
    with progress.task("select", len(rows), "rows") as advance:
        for number, index in enumerate(torch.arange(len(rows)).split(CANDIDATES)):
            name = f"candidates/{number:05d}.safetensors"
            if not writer.has(name):
                figures = Statistics()
                for batch in map(rows.select, index.split(batch_size)):
                    with recording(model, figures.sink(batch.valid, list(range(len(batch))))):
                        run(batch.input_ids, batch.valid, None)
                # The heads of a layer are averaged before the layers are, as layers may differ in heads.
                layers = [found.double().mean(1) for key, found in figures.tensors().items() if key.startswith("esl.")]
                writer.save(name, {"esl": torch.stack(layers).mean(0)})
            esl.append(load_file(writer.path / name)["esl"])
            advance(len(index))
    return torch.cat(esl).argsort(descending=True, stable=True)[:keep].sort().values
