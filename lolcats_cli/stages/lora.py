"""lora: low-rank linearizing (LoLCATs, arXiv 2410.10254, section 3.2). It trains PEFT's LoRA on the attention
projections of the student with its trained maps, by next-token cross-entropy.

The artifact holds `adapter/`, a plain PEFT folder, and `maps/`, the feature maps that go with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from os.path import isfile, join
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.place import Resume

from lolcats_cli import ranks
from lolcats_cli.artifacts.layout import SPLITS, tokens_name
from lolcats_cli.artifacts.maps import kept_config, maps_file
from lolcats_cli.errors import BadInput, IdentityMismatch, UsageError
from lolcats_cli.loading.student import check_on_devices, load_student, teacher_folder
from lolcats_cli.progress import Progress
from lolcats_cli.stages.curves import trainer_callback
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.writing import Making, make_artifact
from lolcats_cli.student.build import hybrid_modules, linear_layers, projections
from lolcats_cli.teacher.data import Rows, describe_rows, read_rows, split_rows
from lolcats_cli.teacher.load import LoadOptions, load_tokenizer, model_limit
from lolcats_cli.teacher.records import DataOptions

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback


def lora(
    transfer: Path | str,
    output: Path | str,
    *,
    options: LoraOptions = LoraOptions(),
    data: str | Sequence[str] | None = None,
    data_options: DataOptions = DataOptions(),
    teacher: str | None = None,
    load: LoadOptions = LoadOptions(),
    gradient_checkpointing: bool = False,
    log_to: str | None = None,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Trains the adapter. Running it again resumes after the last checkpoint.

    Args:
        transfer: a transfer artifact with every layer.
        data: the data to train on, in place of the capture's tokens: a capture artifact, or data as for `capture`.
        teacher: the teacher's folder, if it has moved.
        gradient_checkpointing: compute each layer's activations again in the backward pass instead of keeping them.
        log_to: "tensorboard", "wandb" or "trackio": log the losses there, by transformers' own integration.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        FormatError, BadInput, IdentityMismatch, UsageError: something cannot be used. Raised before any training.
        BadInput: the training diverged.
    """
    options.share(ranks.size())
    if ranks.size() > 1 and "-" in ([data] if isinstance(data, str) else data or ()):
        raise UsageError("Several processes cannot all read --data from stdin. Name a file.")
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate is set up for {engine}. Launch with --multi_gpu alone, and pass --shard to lolcats."
            )
    device = load.resolved_device()
    parent = Artifact.open(transfer, "transfer")
    with ranks.joined(device.type):
        with ranks.one_first():  # it hashes the teacher, and the others find its hashes
            folder = teacher_folder(parent, teacher)
        data_options = replace(data_options, completion=options.loss_on == "completion")
        splits, source = _rows(parent, data, data_options, folder, load, options.seed, progress)
        progress.note(f"loading {folder}")
        student = load_student(parent, folder, load)
        check_on_devices(student, "weights must stay there in a training. Add GPUs, or use torchrun and --shard")
        limit, seq_len = model_limit(student.config), splits["train"].input_ids.shape[1]
        if limit is not None and seq_len > limit:
            raise BadInput(
                f"--seq-len {seq_len} is over the {limit} tokens that the teacher was made for. Choose at most that."
            )
        options = replace(options, targets=_targets(student, options.targets))
        if gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = _with_adapter(student, options, parent)
        fields = {
            "config": {**_config(options, parent), "dtype": str(student.dtype).removeprefix("torch.")},
            "teacher": parent.teacher,
            "data": describe_rows(splits, source),
            "parents": [parent],
        }

        def work(making: Making) -> dict[str, Any]:
            with trainer_callback(log_to, output) as tracker:
                figures = _train(model, splits, options, device, making.main, progress, tracker)
            return figures | {"layers": parent.summary["layers"]}

        return make_artifact(output, "lora", fields, work, resume=resume, force=force, progress=progress)


def _config(options: LoraOptions, parent: Artifact) -> dict[str, Any]:
    given = {key: value for key, value in asdict(options).items() if value is not None}
    return {**given, "targets": list(options.targets or ()), "hybrid": parent.config["hybrid"], **kept_config(parent)}


def _train(
    model: PeftModel,
    splits: dict[str, Rows],
    options: LoraOptions,
    device: torch.device,
    writer: ArtifactWriter | None,
    progress: Progress,
    tracker: TrainerCallback | None,
) -> dict[str, Any]:
    """Trains. The rank that has the writer writes what was trained. Returns the training's figures."""
    from lolcats_cli.stages.lora_training import train

    figures = train(model, splits, options, device, writer, progress, tracker)
    if writer is not None:
        for hybrid in hybrid_modules(model.get_base_model()):
            tensors = {name: tensor.cpu() for name, tensor in hybrid.state_dict().items()}
            writer.save(maps_file(hybrid.layer_idx), tensors)
        _save_adapter(model, writer)
    return figures


def _rows(
    parent: Artifact,
    data: str | Sequence[str] | None,
    options: DataOptions,
    folder: Path,
    load: LoadOptions,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Rows], str | Sequence[str]]:
    """Rows for training and validation, and their source; with `options.completion`, only rows with a completion."""
    first = data if isinstance(data, str) or data is None else data[0]
    if first is None:
        capture = parent.ancestor("capture")
        data = str(capture.path)
    elif isfile(join(first, "manifest.json")):
        capture = Artifact.open(first, "capture")
        if capture.teacher["tokenizer_sha256"] != parent.teacher["tokenizer_sha256"]:
            raise IdentityMismatch(
                f"{first} holds the tokens of a tokenizer that is not the teacher's. Pass text instead."
            )
        if data not in (first, [first]):
            raise UsageError(f"--data {first} is a capture, so it must be the only data.")
    else:
        assert data is not None
        tokenizer, vocab_size = load_tokenizer(folder, load.trust_remote_code), parent.teacher["vocab_size"]
        rows = _to_train(read_rows(data, tokenizer, options, vocab_size=vocab_size, progress=progress), options)
        return dict(zip(SPLITS, split_rows(rows, 0.05, seed), strict=True)), data
    stored = {split: Rows.from_tensors(capture.load(tokens_name(split))) for split in SPLITS}
    return {split: _to_train(rows, options) for split, rows in stored.items()}, data


def _to_train(rows: Rows, options: DataOptions) -> Rows:
    """All rows; with `options.completion`, only the rows with a completion to predict."""
    if not options.completion:
        return replace(rows, completion=None)
    if rows.completion is None:
        raise BadInput(
            "The captured tokens do not tell which of them are a completion's, and --loss-on completion needs that. "
            "Pass the data with --data. If a row does not tell, the error then names it."
        )
    chosen = rows.select(rows.completion[:, 1:].any(1).nonzero()[:, 0])
    if not len(chosen):
        raise BadInput("No row holds a completion to predict, and --loss-on completion needs one. Pass more data.")
    return chosen


def _targets(student: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The modules that get an adapter: those asked for, or all projections of the attentions. Raises UsageError."""
    ours = tuple(dict.fromkeys(projections(student).values()))
    if asked is None:
        return ours
    linear = [f".{name}" for name in linear_layers(student)]
    missing = [target for target in asked if not any(name.endswith(f".{target}") for name in linear)]
    if missing:
        others = sorted({name.rpartition(".")[2] for name in linear} - set(ours))
        raise UsageError(
            f"{type(student).__name__} has no modules named {', '.join(missing)}. The projections of its attentions "
            f"are {', '.join(ours)}. Its other linear layers are {', '.join(others)}. Name some of these with "
            "--targets, or leave it out."
        )
    return asked


def _with_adapter(student: PreTrainedModel, options: LoraOptions, parent: Artifact) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(options.seed)
    model = get_peft_model(
        student,
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; any number will do
            lora_dropout=options.dropout,
            target_modules=list(options.targets or ()),
            task_type="CAUSAL_LM",
        ),
        revision=parent.teacher["revision"],
    )
    for hybrid in hybrid_modules(student):
        hybrid.requires_grad_(options.train_maps)
    return model


def _save_adapter(model: PeftModel, writer: ArtifactWriter) -> None:
    """Writes PEFT's own folder. It holds LoRA alone, because the artifact keeps the maps in files of its own."""
    from lolcats_cli.stages.lora_training import save_adapter

    adapter = writer.path / "adapter"
    save_adapter(model, adapter)
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text())
    # Otherwise the id would depend on the teacher's path, and on the order of a Python set.
    written |= {"base_model_name_or_path": None, "target_modules": sorted(written["target_modules"])}
    config.write_text(json.dumps(written, indent=2) + "\n")
    for file in sorted(adapter.iterdir()):
        writer.adopt(f"adapter/{file.name}")
