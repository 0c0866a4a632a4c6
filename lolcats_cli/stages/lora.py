"""lora: low-rank linearizing (LoLCATs, arXiv 2410.10254, section 3.2). The student with its trained maps, and PEFT LoRA
on the attention projections, trained on next-token cross-entropy.

The artifact holds `adapter/`, a plain PEFT folder, and `maps/`, the feature maps that go with it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.writer import Resume
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lolcats_cli import __version__, stopping
from lolcats_cli.errors import BadInput, IdentityMismatch, UsageError
from lolcats_cli.progress import Advance, Progress
from lolcats_cli.stages.capture import SPLITS
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.models import kept_config, load_student, maps_file, teacher_folder
from lolcats_cli.student.build import as_teacher, hybrid_modules, linear_layers, projections
from lolcats_cli.teacher.data import DataOptions, Rows, describe_rows, read_rows, split_rows
from lolcats_cli.teacher.load import LoadOptions, load_tokenizer, model_limit

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

    from lolcats_cli.student.attention import HybridAttention


# What a recipe means, where an option does not say otherwise. lolcats: the paper's, as in LoraOptions; best: what did
# better at the same number of tokens (docs/quality.md).
RECIPES: dict[str, dict[str, Any]] = {
    "best": {"train_maps": True, "grad_accum": 2, "lr": 5e-4, "eval_steps": 400},
    "lolcats": {"train_maps": False, "grad_accum": 8, "lr": 1e-4, "eval_steps": 100},
}


@dataclass(frozen=True)
class LoraOptions:
    """How the adapter is trained; the defaults are the paper's for 8B models.

    Attributes:
        rank, alpha, dropout, targets: PEFT's `r`, `lora_alpha`, `lora_dropout` and `target_modules`; without targets,
            all projections of the attentions.
        train_maps: train the feature maps and γ too.
        match: what the student's predictions are trained on: the "text" (next-token cross-entropy), or the "teacher"'s
            predictions on it (KL divergence), at the cost of one forward pass of the teacher more.
        batch_size, grad_accum: rows per forward pass, and passes per optimizer step.
        epochs, steps: length of the training; `steps` wins.
        lr, clip: AdamW's learning rate; the largest gradient norm.
        schedule: of the learning rate: "plateau" (reduced when the validation loss no longer falls) or "linear" (to 0
            at the last step).
        eval_steps: optimizer steps between validations.
        seed: initial adapter, dropout, and the order of the rows.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    train_maps: bool = False
    match: str = "text"
    batch_size: int = 1
    grad_accum: int = 8
    epochs: int = 2
    steps: int | None = None
    lr: float = 1e-4
    clip: float = 1.0
    schedule: str = "plateau"
    eval_steps: int = 100
    seed: int = 0


def lora(
    transfer: Path | str,
    output: Path | str,
    *,
    options: LoraOptions = LoraOptions(),
    data: str | None = None,
    data_options: DataOptions = DataOptions(),
    teacher: str | None = None,
    load: LoadOptions = LoadOptions(),
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Train the adapter. Running it again resumes after the last checkpoint.

    Args:
        transfer: a transfer artifact with every layer.
        data: other data than the capture's tokens: a capture artifact, a file, "-" or a hub dataset id.
        teacher: the teacher's folder, if it is not where it was captured.
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        FormatError, BadInput, IdentityMismatch, UsageError: what cannot be used, before any training.
    """
    parent = Artifact.open(transfer, "transfer")
    folder = teacher_folder(parent, teacher)
    splits, source = _rows(parent, data, data_options, folder, load, options.seed)
    student = load_student(parent, folder, load)
    limit, seq_len = model_limit(student.config), splits["train"].input_ids.shape[1]
    if limit is not None and seq_len > limit:
        raise BadInput(f"--seq-len {seq_len} is over the {limit} tokens that the teacher was made for.")
    options = replace(options, targets=_targets(student, options.targets))
    model = _with_adapter(student, options, parent)

    config = {key: value for key, value in asdict(options).items() if value is not None}
    with ArtifactWriter.create(
        output,
        "lora",
        config={
            **config,
            "targets": list(options.targets or ()),
            "hybrid": parent.config["hybrid"],
            "dtype": str(student.dtype).removeprefix("torch."),
            **kept_config(parent),
        },
        teacher=parent.teacher,
        data=describe_rows(splits, source),
        parents=[parent],
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        summary = _train(model, splits, options, load, writer, progress)
        for hybrid in hybrid_modules(student):
            writer.save(
                maps_file(hybrid.layer_idx), {name: tensor.cpu() for name, tensor in hybrid.state_dict().items()}
            )
        _save_adapter(model, writer)
        return writer.finish({**summary, "layers": parent.summary["layers"]})


def _rows(
    parent: Artifact, data: str | None, options: DataOptions, folder: Path, load: LoadOptions, seed: int
) -> tuple[dict[str, Rows], str]:
    """Training and validation rows, and where they came from."""
    if data is None:
        capture = parent.ancestor("capture")
        data = str(capture.path)
    elif (Path(data) / "manifest.json").is_file():
        capture = Artifact.open(data, "capture")
        if capture.teacher["tokenizer_sha256"] != parent.teacher["tokenizer_sha256"]:
            raise IdentityMismatch(f"{data} holds tokens of another tokenizer than the teacher's. Pass text instead.")
    else:
        rows = read_rows(data, load_tokenizer(folder, load.trust_remote_code), options)
        return dict(zip(SPLITS, split_rows(rows, 0.05, seed), strict=True)), data
    return {split: Rows.from_tensors(capture.load(f"tokens/{split}.safetensors")) for split in SPLITS}, data


def _targets(student: PreTrainedModel, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The modules that get an adapter: those asked for, or all projections of the attentions. Raises UsageError."""
    ours = projections(student)
    if asked is None:
        return tuple(ours)
    linear = [f".{name}" for name in linear_layers(student)]
    missing = [target for target in asked if not any(name.endswith(f".{target}") for name in linear)]
    if missing:
        others = sorted({name.rpartition(".")[2] for name in linear} - set(ours))
        raise UsageError(
            f"{type(student).__name__} has no modules named {', '.join(missing)}. The projections of its attentions "
            f"are {', '.join(ours)}; other linear layers are {', '.join(others)}. Name some with --targets, or leave "
            "it out."
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


class _TokenRows(torch.utils.data.Dataset):
    """Rows as the Trainer takes them: labels are the tokens themselves, padding is not predicted."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows.input_ids[index].long()
        if self.rows.valid is None:
            return {"input_ids": ids, "labels": ids}
        valid = self.rows.valid[index]
        return {"input_ids": ids, "attention_mask": valid.long(), "labels": ids.masked_fill(~valid, -100)}


def _train(
    model: PeftModel,
    splits: dict[str, Rows],
    options: LoraOptions,
    load: LoadOptions,
    writer: ArtifactWriter,
    progress: Progress,
) -> dict:
    from transformers import Trainer, TrainingArguments

    trainer = (Trainer if options.match == "text" else _distiller())(
        model=model,
        args=TrainingArguments(
            output_dir=str(writer.scratch),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.grad_accum,
            num_train_epochs=options.epochs,
            max_steps=-1 if options.steps is None else options.steps,
            learning_rate=options.lr,
            lr_scheduler_type={"plateau": "reduce_lr_on_plateau"}.get(options.schedule, options.schedule),
            weight_decay=0.0,
            max_grad_norm=options.clip,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            logging_steps=1,  # Trainer's own mean over more steps would not survive a resume
            save_strategy="no",  # the reporter says when
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            use_cpu=load.resolved_device().type == "cpu",
            dataloader_pin_memory=False,
            prediction_loss_only=True,
        ),
        train_dataset=_TokenRows(splits["train"]),
        eval_dataset=_TokenRows(splits["validation"]),
    )
    trainer.remove_callback(_printer())
    checkpoints, maps = Checkpoints(writer), hybrid_modules(model.get_base_model())
    reporter = _reporter(writer.log, options.eval_steps, checkpoints, maps if options.train_maps else [])
    trainer.add_callback(reporter)
    saved = writer.restart()
    if saved is None:
        trainer.evaluate()
    else:
        reporter.load(saved)
    total = trainer.args.max_steps if trainer.args.max_steps > 0 else _steps(len(splits["train"]), options)
    with progress.task("lora", total, "steps") as advance, stopping.deferred():
        reporter.advance = advance
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    if reporter.evaluated != trainer.state.global_step:
        trainer.evaluate()
    progress.note(f"validation loss {reporter.initial:.3f} -> {reporter.loss:.3f} nats per token")
    return {"initial_loss": reporter.initial, "loss": reporter.loss, "steps": trainer.state.global_step}


def _steps(rows: int, options: LoraOptions) -> int:
    batches = -(-rows // options.batch_size)
    return options.epochs * -(-batches // options.grad_accum)


def _distiller() -> type[Trainer]:
    from transformers import Trainer

    class Distiller(Trainer):
        """Trains on the teacher's predictions: the mean over tokens of KL(teacher || student). The teacher is the same
        weights, as they were. Validation stays next-token cross-entropy."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            real = inputs["labels"][:, 1:] != -100
            given = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
            with torch.no_grad(), as_teacher(cast("PeftModel", self.model)):
                wanted = model(**given).logits[:, :-1][real].float().log_softmax(-1)
            found = model(**given).logits[:, :-1][real].float().log_softmax(-1)
            loss = functional.kl_div(found, wanted, reduction="sum", log_target=True)
            # Trainer divides by the number of batches in a step unless the loss is one over the step's tokens.
            over_step = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            return loss / (num_items_in_batch if over_step else real.sum().clamp(min=1))

    return Distiller


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _reporter(log: Callable[..., None], every: int, checkpoints: Checkpoints, maps: list[HybridAttention]):
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Trainer's events, into our metrics, progress and checkpoints.

        `initial` and `loss` are the first and the last validation's, the latter after `evaluated` steps; `losses` are
        the training losses since the last event.
        """

        def __init__(self) -> None:
            self.advance: Advance = lambda done=1, **figures: None
            self.initial, self.loss, self.evaluated = math.nan, math.nan, -1
            self.losses: list[float] = []
            self.since = 0.0  # when the work that precedes a save ended

        def load(self, folder: Path) -> None:
            """Continue from a checkpoint: our part of it."""
            vars(self).update(json.loads((folder / "reporter.json").read_text()))
            for hybrid in maps:
                hybrid.load_state_dict(load_file(folder / f"maps-{hybrid.layer_idx}.safetensors"))

        def on_train_begin(self, args, state, control, **kwargs):
            self.advance(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            # Not at the end: Trainer resumed there would go on, and what is left takes seconds.
            control.should_save = state.global_step < state.max_steps and checkpoints.due()
            self.advance(1)

        def on_evaluate(self, args, state, control, **kwargs):
            self.evaluated, self.loss = state.global_step, kwargs["metrics"]["eval_loss"]
            if self.evaluated == 0:
                self.initial = self.loss
            log(event="validation", step=self.evaluated, loss=self.loss)
            self.since = time.monotonic()

        def on_log(self, args, state, control, **kwargs):
            logs = kwargs["logs"]
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.advance(0, loss=logs["loss"])
                if state.global_step % every == 0:
                    mean = sum(self.losses) / len(self.losses)
                    log(event="train", step=state.global_step, loss=mean, lr=logs["learning_rate"])
                    self.losses = []
                self.since = time.monotonic()

        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for name in ("training_args.bin", "README.md"):  # a pickle that nobody reads; a template
                (folder / name).unlink(missing_ok=True)
            numbers = {name: getattr(self, name) for name in ("initial", "loss", "evaluated", "losses")}
            (folder / "reporter.json").write_text(json.dumps(numbers))
            for hybrid in maps:
                tensors = {name: tensor.cpu() for name, tensor in hybrid.state_dict().items()}
                save_file(tensors, folder / f"maps-{hybrid.layer_idx}.safetensors")
            checkpoints.record(folder, self.since)

    return Reporter()


def _save_adapter(model: PeftModel, writer: ArtifactWriter) -> None:
    """Write PEFT's own folder. The maps are in ours, so the adapter is LoRA alone."""
    adapter = writer.path / "adapter"
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card says nothing
    config = adapter / "adapter_config.json"
    # Not the teacher's path here: the id would depend on it, and the adapter is the student's, not the teacher's.
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}, indent=2) + "\n")
    for file in sorted(adapter.iterdir()):
        writer.adopt(f"adapter/{file.name}")
