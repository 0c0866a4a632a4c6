"""capture: what a teacher's attentions see on some data, kept on disk.

The artifact holds the tokens and, by its store, q, k and v of every layer, hidden states, or nothing more; and, if
asked, the likeliest next tokens (`artifacts/layout.py`). Beside them it holds figures of the attention of some rows
(see `attention_statistics`). Of rows selected by their ESL, `candidates/GGGGG.safetensors` keeps the `esl` [n] of all.

The teacher's layers run block by block: all rows pass through a block before the next one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import Artifact, holds_artifact
from lolcats_formats.place import Resume
from safetensors.torch import load_file
from torch import Tensor

from lolcats_cli import ranks, stopping
from lolcats_cli.artifacts.disk import check_space, free_space, human
from lolcats_cli.artifacts.layout import SPLITS, Layout, candidates_name, summarize, tokens_name
from lolcats_cli.artifacts.stores import Sizes
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.stages.auto_store import device_memory, pick, sizes_of, store_config
from lolcats_cli.stages.mergeable import check_mergeable
from lolcats_cli.stages.units import Statistics, record_units
from lolcats_cli.stages.writing import Making, check_config, make_artifact
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.blocks import Run, block
from lolcats_cli.teacher.data import Rows, describe_rows, read_rows, split_numbers, split_rows
from lolcats_cli.teacher.load import (
    LoadOptions,
    check_length,
    first_line,
    indexer_limit,
    load_model,
    load_outline,
    load_tokenizer,
    longrope_limit,
    resolve_folder,
    runs_own_code,
)
from lolcats_cli.teacher.record import LayerInfo, probe, recording
from lolcats_cli.teacher.records import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = 64  # rows of one file of candidates: what is done again after a crash
ADVICE = "Store less with --store block or --store tokens, take fewer --samples, or use another disk."


def capture(
    teacher: str,
    data: str | Sequence[str],
    output: Path | str,
    *,
    options: DataOptions = DataOptions(),
    load: LoadOptions = LoadOptions(),
    store: str = "attention",
    block_size: int | None = None,
    disk: float | None = None,
    memory: float | None = None,
    store_dtype: str = "teacher",
    store_logits: int | None = None,
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
    """Runs the teacher over the data, and keeps tokens and activations. Running it again resumes.

    Args:
        teacher: a model folder, or a hub id (with `revision`).
        data: one or several files, folders, patterns, "-" for stdin, or hub dataset ids.
        output: the artifact's directory.
        store: what is kept: "attention", "block" or "tokens" (`artifacts/layout.py`), or "auto". "auto" keeps the store
            of a capture that is continued, and otherwise takes the first store that fits (`stores.choose`).
        block_size: the layers of a block, for the store "block"; 8 by default.
        disk, memory: bytes that "auto" may use; by default what is free on the disk and on the device.
        store_dtype: the dtype of q, k and v on disk, for the store "attention": "teacher" (the teacher's own dtype), or
            "float8_e4m3".
        store_logits: keep the log-probabilities of this number of next tokens behind every token, the likeliest ones.
        statistics: the rows whose attention is measured: "sample" (one in 16), "all" or "none".
        keep: keep this number of the data's rows: those with the largest ESL, averaged over heads and layers. They stay
            in their order.
        val_fraction: the part of the rows kept for validation, at least one row.
        batch_size: rows per forward pass.
        seed: draws the validation rows.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        BadInput: the teacher or the data cannot be used, or an attention cannot be recorded.
        UsageError: `keep` is more than the number of rows, or `store_logits` more than the vocabulary.
        NotEnoughSpace: the disk has too little space for the capture, or no store fits.
    """
    folder = resolve_folder(teacher, revision)
    device = load.resolved_device()
    memory = memory or device_memory(device)
    with ranks.joined(device.type):
        settings = _settings(options, keep, store_dtype, store_logits, statistics, val_fraction, seed)
        unknown = ("samples", "dtype", "store", "block_size", "batch_size")
        finished = check_config(output, "capture", settings, force=force, unknown=unknown)
        if not finished:
            check_mergeable(folder)
        config = _auto_config(folder, load)
        _check_limits(config, options.seq_len, store_logits, teacher)
        found = ranks.share(lambda: _read(data, folder, options, config, load, progress))
        if keep is not None and keep > len(found):
            raise UsageError(f"--keep {keep} is more than the {len(found)} rows of the data. Choose a smaller number.")
        source = _Teacher(teacher, folder, load, device, progress)
        layers = [] if finished else source.layers
        with ranks.one_first():  # it hashes the teacher, and the others find its hashes
            described = (
                recorded_teacher(output, folder, revision)
                if finished
                else describe_teacher(source.model, folder, revision, layers)
            )
        settings |= {
            "samples": [options.first, options.first + len(found) - 1],
            "dtype": str((load_outline(folder, load) if finished else source.model).dtype).removeprefix("torch."),
        }

        def sizes() -> Sizes:
            return sizes_of(
                source.model, source.layers, keep or len(found), options.seq_len, batch_size, store_logits or 0
            )

        if store == "auto":
            free, cpu = disk or free_space(output), device.type == "cpu"
            store, block_size = ranks.share(
                lambda: pick(sizes, batch_size, settings, output, force, free, memory, cpu, progress)
            )
        kept = store_config(store, block_size, batch_size)
        fields: dict[str, Any] = {
            "config": {**settings, **kept},
            "teacher": described,
            "data": _describe_data(found, data, keep, val_fraction, seed),
        }
        if ranks.rank() == 0 and not holds_artifact(output):
            check_space(Layout.of(fields).bytes, output, ADVICE)  # before the directory is bound to these options

        def work(making: Making) -> dict[str, Any]:
            held = sizes().capture_memory(store, kept.get("block_size"))
            progress.note(
                f"capture will use up to {human(held.device)} of the device's memory and {human(held.host)} of the "
                "host's"
            )
            run = _Run(source.model, device, batch_size, making, progress)
            return run.capture(found if keep is None else run.select(found, keep))

        return make_artifact(output, "capture", fields, work, resume=resume, force=force, progress=progress)


def _settings(
    options: DataOptions,
    keep: int | None,
    store_dtype: str,
    store_logits: int | None,
    statistics: str,
    val_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """What the configuration has before the data and the teacher are read."""
    return {
        "data": options.to_config(),
        **({} if keep is None else {"select": "top-esl", "keep": keep}),
        **({} if store_dtype == "teacher" else {"stored": store_dtype}),
        **({} if store_logits is None else {"logits": store_logits}),
        **({} if statistics == "all" else {"statistics": statistics}),
        "val_fraction": val_fraction,
        "seed": seed,
    }


@dataclass(frozen=True)
class _Teacher:
    """The teacher. It is loaded when it is asked for, which it is not if the capture is finished already."""

    name: str
    folder: Path
    load: LoadOptions
    device: torch.device
    progress: Progress

    @cached_property
    def model(self) -> PreTrainedModel:
        """All of it on the CPU. Blocks of it are moved when they are run."""
        self.progress.note(f"loading {self.folder}")
        return load_model(self.folder, replace(self.load, device="cpu"))

    @cached_property
    def layers(self) -> list[LayerInfo]:
        """Its layers, probed. Raises `BadInput` if one cannot be recorded."""
        everything = range(self.model.config.get_text_config().num_hidden_layers)
        with block(self.model, everything, _probe_device(self.model, self.device)):
            layers = probe(self.model)
        self.progress.note(f"{self.name}: {len(layers)} attention layers, every one recorded and reproduced")
        return layers


def _check_limits(config: Any, seq_len: int, store_logits: int | None, teacher: str) -> None:
    vocab_size = config.get_text_config().vocab_size
    if store_logits is not None and store_logits > vocab_size:
        raise UsageError(
            f"--store-logits {store_logits} is more than the {vocab_size} tokens of {teacher}'s vocabulary."
        )
    check_length(seq_len, config, teacher)
    short, chosen = longrope_limit(config), indexer_limit(config)
    if short is not None and seq_len > short:
        raise BadInput(
            f"--seq-len {seq_len} is over {short}. {teacher} uses other rotation factors (longrope) for sequences that "
            f"are longer than that, and a student keeps the factors of short sequences. Choose at most {short}."
        )
    if chosen is not None and seq_len > chosen:
        raise BadInput(
            f"--seq-len {seq_len} is over {chosen}. In longer rows an indexer chooses {chosen} keys for the attention "
            f"of {teacher}, and a student can only learn from attention that sees all keys. Choose at most {chosen}."
        )


def _auto_config(folder: Path, load: LoadOptions) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=runs_own_code(folder, load.trust_remote_code))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"The configuration in {folder} cannot be read by transformers: {first_line(error)}") from error


def _read(
    data: str | Sequence[str], folder: Path, options: DataOptions, config: Any, load: LoadOptions, progress: Progress
) -> Rows:
    tokenizer, vocab_size = load_tokenizer(folder, load.trust_remote_code), config.get_text_config().vocab_size
    return read_rows(data, tokenizer, options, vocab_size=vocab_size, progress=progress)


def _probe_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """The device if the whole model fits into its memory, else the CPU."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if sum(p.nbytes for p in model.base_model.parameters()) < 0.9 * free else torch.device("cpu")


def describe_teacher(
    model: PreTrainedModel, folder: Path, revision: str | None, layers: list[LayerInfo]
) -> dict[str, Any]:
    """An artifact's entry about its teacher: its path, its identity and its layers."""
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


def recorded_teacher(output: Path | str, folder: Path, revision: str | None) -> dict[str, Any]:
    """What `describe_teacher` gives, without loading the teacher: what the finished artifact in `output` has, with the
    identity of the teacher in `folder`. If that is another teacher, the two differ."""
    recorded = Artifact.open(output).teacher
    return {**recorded, "path": str(folder), "revision": revision, **identity.identify(folder)}


def _describe_data(
    found: Rows, path: str | Sequence[str], keep: int | None, val_fraction: float, seed: int
) -> dict[str, Any]:
    """The identity of the rows. If rows are still to be selected, it is the identity of the candidates."""
    if keep is None:
        return describe_rows(dict(zip(SPLITS, split_rows(found, val_fraction, seed), strict=True)), path)
    kept = dict(zip(SPLITS, map(len, split_numbers(keep, val_fraction, seed)), strict=True))
    return {**describe_rows({"candidates": found}, path), "rows": kept}


@dataclass
class _Run:
    """What a capture computes and writes, on one rank."""

    model: PreTrainedModel
    device: torch.device
    batch_size: int
    making: Making
    progress: Progress

    def select(self, rows: Rows, keep: int) -> Rows:
        """The rows with the largest ESL, in their order. Of rows with the same ESL, the earlier ones are taken."""
        everything = range(self.model.config.get_text_config().num_hidden_layers)
        written = self.making.completed_files()
        parts = list(enumerate(torch.arange(len(rows)).split(CANDIDATES)))[ranks.rank() :: ranks.size()]
        with (
            self.making.part() as (writer, whole),
            block(self.model, everything, self.device) as run,
            self.progress.task("select", sum(len(index) for _, index in parts), "rows") as advance,
        ):
            for number, index in parts:
                if candidates_name(number) not in written:
                    writer.save(candidates_name(number), {"esl": self._esl(run, rows.select(index))})
                advance(len(index))
        files = [whole / candidates_name(number) for number in range(-(-len(rows) // CANDIDATES))]
        esl = torch.cat([load_file(file)["esl"] for file in files])
        return rows.select(esl.argsort(descending=True, stable=True)[:keep].sort().values)

    def _esl(self, run: Run, rows: Rows) -> Tensor:
        """The rows' effective sequence length [N], averaged over heads and layers."""
        figures = Statistics()
        for batch in map(rows.select, torch.arange(len(rows)).split(self.batch_size)):
            with recording(self.model, figures.sink(batch.valid, list(range(len(batch))))):
                run(batch.input_ids, batch.valid, None)
        # The heads of a layer are averaged before the layers are, as layers may differ in heads.
        layers = [found.double().mean(1) for key, found in figures.tensors().items() if key.startswith("esl.")]
        return torch.stack(layers).mean(0)

    def capture(self, found: Rows) -> dict[str, Any]:
        """Computes and writes what is stored of the rows. Returns the artifact's summary on rank 0."""
        layout, config, main = Layout.of(self.making.fields), self.making.fields["config"], self.making.main
        rows = dict(zip(SPLITS, split_rows(found, config["val_fraction"], config["seed"]), strict=True))
        written = self.making.completed_files()
        mine = [unit for unit in layout.all_units() if unit.number % ranks.size() == ranks.rank()]
        todo = [unit for unit in mine if not written.issuperset(unit.files)]
        if main:
            missing = (unit for unit in layout.all_units() if not written.issuperset(unit.files))
            needed = sum(len(u.rows) * layout.row_file_bytes(key) for u in missing for key in u.activations)
            tokens = {tokens_name(split): rows[split].to_tensors() for split in SPLITS}
            tokens = {name: tensors for name, tensors in tokens.items() if not main.has(name)}
            needed += sum(x.nbytes for tensors in tokens.values() for x in tensors.values())
            self.progress.note(f"capture will write {check_space(needed, main.path, ADVICE)}")
            for name, tensors in tokens.items():
                main.save(name, tensors)
        with (
            self.making.part() as (writer, whole),
            self.progress.task("capture", sum(len(unit.computed) for unit in mine), "rows") as advance,
            stopping.deferred(),
        ):
            advance(sum(len(unit.computed) for unit in mine) - sum(len(unit.computed) for unit in todo))
            record_units(self.model, layout, todo, rows, self.device, self.batch_size, writer, whole, advance)
        return {"bytes": layout.bytes, "layers": summarize(whole, layout, rows)} if main else {}
