"""lora: low-rank linearizing (LoLCATs, arXiv 2410.10254, section 3.2). It trains PEFT's LoRA on the attention
projections of the student with its trained maps, by next-token cross-entropy. It can also train all of the projections.

The artifact holds `adapter/`, a plain PEFT folder, and `maps/`, the feature maps that go with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.place import Resume

from lolcats_cli import ranks
from lolcats_cli.artifacts.disk import human
from lolcats_cli.artifacts.maps import kept_config, maps_file
from lolcats_cli.errors import NotEnoughSpace, UsageError
from lolcats_cli.loading.student import check_on_devices, load_student, teacher_folder
from lolcats_cli.progress import Progress
from lolcats_cli.stages.auto_store import device_memory
from lolcats_cli.stages.curves import trainer_callback
from lolcats_cli.stages.lora_data import LikeliestTokens, TrainingData, training_data
from lolcats_cli.stages.lora_options import LoraOptions, check_processes
from lolcats_cli.stages.writing import Making, check_config, make_artifact
from lolcats_cli.student.build import hybrid_modules, linear_layers, projections
from lolcats_cli.teacher.data import describe_rows
from lolcats_cli.teacher.load import LoadOptions, check_length, load_outline
from lolcats_cli.teacher.records import DataOptions

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

OPTIMIZER = 12  # bytes per trained weight: its gradient, and AdamW's two moments, in fp32


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
        NotEnoughSpace: all of the projections are trained, and the device has too little memory for that.
        BadInput: the training diverged.
    """
    check_processes(options, data, load.shard)
    device = load.resolved_device()
    parent = Artifact.open(transfer, "transfer")
    with ranks.joined(device.type):
        config, unknown = _config(options, parent), ("targets", "logits", "dtype")
        check_config(output, "lora", config, force=force, unknown=unknown)
        with ranks.one_first():  # it hashes the teacher, and the others find its hashes
            folder = teacher_folder(parent, teacher)
        data_options = replace(data_options, completion=options.loss_on == "completion")
        given = training_data(parent, data, data_options, folder, load, options.seed, progress)
        outline = load_outline(folder, load)
        check_length(given.splits["train"].input_ids.shape[1], outline.config, "the teacher")
        options = replace(options, targets=_targets(outline, options.targets))
        stored = _stored_predictions(given, options)
        fields: dict[str, Any] = {
            "config": {
                **_config(options, parent),
                **({} if stored is None else {"logits": stored}),
                "dtype": str(outline.dtype).removeprefix("torch."),
            },
            "teacher": parent.teacher,
            "data": describe_rows(given.splits, given.source),
            "parents": [parent],
        }

        @cache
        def ready() -> tuple[PreTrainedModel | PeftModel, LikeliestTokens | None]:
            likeliest = _likeliest(given, stored, options, progress)
            progress.note(f"loading {folder}")
            student = load_student(parent, folder, load)
            check_on_devices(student, "weights must stay there in a training. Add GPUs, or use torchrun and --shard")
            if gradient_checkpointing:
                student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return _trainable(student, options, parent, device, progress), likeliest

        if not check_config(output, "lora", fields["config"], force=force):
            ready()  # before anything is written

        def work(making: Making) -> dict[str, Any]:
            model, likeliest = ready()
            with trainer_callback(log_to, output) as tracker:
                figures = _train(model, given, likeliest, options, device, making.main, progress, tracker)
            return figures | {"layers": parent.summary["layers"]}

        return make_artifact(output, "lora", fields, work, resume=resume, force=force, progress=progress)


def _stored_predictions(given: TrainingData, options: LoraOptions) -> int | None:
    """How many of the teacher's likeliest next tokens are stored for the rows, if they are trained on; else None."""
    if options.match == "text":
        return None
    if given.stored is None and options.full_attention:
        raise UsageError(
            "--full-attention changes the weights that the teacher needs, so --match teacher needs stored predictions. "
            "Capture with --store-logits, or pass such a capture with --data."
        )
    return given.stored


def _likeliest(
    given: TrainingData, stored: int | None, options: LoraOptions, progress: Progress
) -> LikeliestTokens | None:
    """The stored predictions that are trained on, if there are any."""
    if options.match == "text":
        return None
    if stored is None:
        progress.note("--match teacher runs the teacher on every row, as no capture stores its predictions on them")
        return None
    likeliest = given.likeliest()
    progress.note(f"--match teacher takes the {stored} likeliest next tokens that {likeliest.path} stores")
    return likeliest


def _config(options: LoraOptions, parent: Artifact) -> dict[str, Any]:
    unused = {"rank", "alpha", "dropout"} if options.full_attention else set()
    for newer in ("match_weight", "full_attention"):  # earlier artifacts keep their configuration
        if getattr(options, newer) == getattr(LoraOptions, newer):
            unused.add(newer)
    given = {key: value for key, value in asdict(options).items() if value is not None and key not in unused}
    return {**given, "targets": list(options.targets or ()), "hybrid": parent.config["hybrid"], **kept_config(parent)}


def _train(
    model: PreTrainedModel | PeftModel,
    given: TrainingData,
    likeliest: LikeliestTokens | None,
    options: LoraOptions,
    device: torch.device,
    writer: ArtifactWriter | None,
    progress: Progress,
    tracker: TrainerCallback | None,
) -> dict[str, Any]:
    """Trains. The rank that has the writer writes what was trained. Returns the training's figures."""
    from lolcats_cli.stages.lora_training import train

    figures = train(model, given.splits, likeliest, options, device, writer, progress, tracker)
    if writer is not None:
        for hybrid in hybrid_modules(model):
            tensors = {name: tensor.cpu() for name, tensor in hybrid.state_dict().items()}
            writer.save(maps_file(hybrid.layer_idx), tensors)
        _save_adapter(model, options, writer)
    return figures


def _targets(model: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The modules that get an adapter: those asked for, or all projections of the attentions. Raises UsageError."""
    ours = tuple(dict.fromkeys(projections(model).values()))
    if asked is None:
        return ours
    linear = [f".{name}" for name in linear_layers(model)]
    missing = [target for target in asked if not any(name.endswith(f".{target}") for name in linear)]
    if missing:
        others = sorted({name.rpartition(".")[2] for name in linear} - set(ours))
        raise UsageError(
            f"{type(model).__name__} has no modules named {', '.join(missing)}. The projections of its attentions "
            f"are {', '.join(ours)}. Its other linear layers are {', '.join(others)}. Name some of these with "
            "--targets, or leave it out."
        )
    return asked


def _trainable(
    student: PreTrainedModel, options: LoraOptions, parent: Artifact, device: torch.device, progress: Progress
) -> PreTrainedModel | PeftModel:
    """The student with what is trained: an adapter, or all of the projections; and the maps."""
    from transformers import set_seed

    set_seed(options.seed)
    if options.full_attention:
        from lolcats_cli.student.full_rank import train_in_full

        number = train_in_full(student, options.targets or ())
        _check_memory(number, device)
        progress.note(f"training {number:,} weights in fp32, with {human(OPTIMIZER * number)} of AdamW's states")
        model: PreTrainedModel | PeftModel = student
    else:
        model = _with_adapter(student, options, parent)
    for hybrid in hybrid_modules(student):
        hybrid.requires_grad_(options.train_maps)
    return model


def _check_memory(number: int, device: torch.device) -> None:
    """Raises NotEnoughSpace unless the device has memory for the gradients and AdamW's states of so many weights."""
    needed, free = OPTIMIZER * number, device_memory(device)
    if needed > free:
        raise NotEnoughSpace(
            f"--full-attention needs {human(needed)} more of the device's memory for gradients and AdamW's states, and "
            f"{human(free)} are free. Leave it out, or name fewer modules with --targets."
        )


def _with_adapter(student: PreTrainedModel, options: LoraOptions, parent: Artifact) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
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


def _save_adapter(model: PreTrainedModel | PeftModel, options: LoraOptions, writer: ArtifactWriter) -> None:
    """Writes PEFT's own folder: LoRA, or weights in full. The maps are not in it, as they have files of their own."""
    adapter = writer.path / "adapter"
    if options.full_attention:
        from lolcats_cli.student.full_rank import save_full_adapter

        save_full_adapter(model, options.targets or (), adapter)
    else:
        from lolcats_cli.stages.lora_training import save_adapter

        save_adapter(cast("PeftModel", model), adapter)
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text())
    # Otherwise the id would depend on the teacher's path, and on the order of a Python set.
    written["base_model_name_or_path"] = None
    if not options.full_attention:
        written["target_modules"] = sorted(written["target_modules"])
    config.write_text(json.dumps(written, indent=2) + "\n")
    for file in sorted(adapter.iterdir()):
        writer.adopt(f"adapter/{file.name}")
