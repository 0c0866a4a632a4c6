"""The training of `lora`. It uses transformers' Trainer, on one device or in several processes (ranks).

To import this module takes seconds, so nothing imports it before all options are checked.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from lolcats_formats import ArtifactWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from lolcats_cli import ranks, stopping
from lolcats_cli.errors import BadInput
from lolcats_cli.progress import Advance, Progress
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.lora_data import LikeliestTokens
from lolcats_cli.stages.lora_losses import IGNORED, divergence, divergence_of_likeliest, negative_log_likelihood
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.student.build import as_teacher
from lolcats_cli.teacher.data import Rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAINED = "trained.safetensors"  # what is trained, in a checkpoint
POINTS = 200  # roughly the number of training losses that are logged of a run


def train(
    model: PreTrainedModel | PeftModel,
    splits: dict[str, Rows],
    likeliest: LikeliestTokens | None,
    options: LoraOptions,
    device: torch.device,
    writer: ArtifactWriter | None,
    progress: Progress,
    tracker: TrainerCallback | None = None,
) -> dict[str, Any]:
    """Trains the parameters that require gradients. If there is a checkpoint, it continues from there.

    Args:
        model: the student, with PEFT's adapter if one is trained.
        splits: the rows of "train" and of "validation".
        likeliest: the teacher's predictions on the former, if `options.match` needs them and they are stored.
        writer: writes the artifact on rank 0. It is None on the other ranks.
        tracker: a callback of transformers that also receives the losses.

    Returns:
        The validation loss before the training (`initial_loss`) and after it (`loss`), in nats per token, and the
        number of optimizer `steps`.

    Raises:
        BadInput: the training diverged.
    """
    scratch, saved = ranks.share(lambda: _resume_state(cast(ArtifactWriter, writer)))
    settings = arguments(options, device, scratch)
    if tracker is not None:
        settings.project, settings.run_name = "lolcats", Path(scratch).parent.name
    if settings.only_device is not None:
        torch.cuda.set_device(device)  # where Trainer's libraries put what they make
    trainer = (StudentTrainer if options.match == "text" else Distiller)(
        model=model,
        args=settings,
        train_dataset=TokenRows(splits["train"], likeliest),
        eval_dataset=TokenRows(splits["validation"]),
    )
    trainer.match_weight = options.match_weight
    trainer.remove_callback(PrinterCallback)
    reporter = Reporter(writer, options, trainer.order)
    trainer.add_callback(reporter)
    if tracker is not None:
        trainer.add_callback(tracker)
    if saved is None:
        trainer.evaluate()
    else:
        reporter.load(Path(saved))
    steps_per_epoch = math.ceil(len(splits["train"]) / (options.batch_size * options.grad_accum))
    total = options.steps or options.epochs * steps_per_epoch
    with progress.task("lora", total, "steps") as advance, stopping.deferred():
        reporter.advance = advance
        trainer.train(resume_from_checkpoint=saved)
    if reporter.evaluated != trainer.state.global_step:
        trainer.evaluate()
        trainer.callback_handler.on_train_end(settings, trainer.state, trainer.control)  # the tracker closes again
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise diverged(f"{name} holds NaN or infinity", trainer.state.global_step, options)
    progress.note(f"validation loss {reporter.initial:.3f} -> {reporter.loss:.3f} nats per token")
    return {"initial_loss": reporter.initial, "loss": reporter.loss, "steps": trainer.state.global_step}


def _resume_state(writer: ArtifactWriter) -> tuple[str, str | None]:
    """The folder for checkpoints, and the checkpoint to continue from, if there is one."""
    saved = writer.restart()
    return str(writer.scratch), None if saved is None else str(saved)


def diverged(what: str, step: int, options: LoraOptions) -> BadInput:
    """The error for a training that diverged."""
    return BadInput(
        f"The training diverged: {what} at step {step}. Start again with --force and a lower --lr (it was "
        f"{options.lr:g}), or with more rows per step (--grad-accum)."
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter, but not the maps, as a folder of PEFT. Every rank has all of the adapter's weights."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card says nothing


@dataclass
class Arguments(TrainingArguments):
    """Trainer's settings, restricted to one device. Trainer would otherwise use every GPU, each with a whole batch.

    Attributes:
        only_device: the GPU that is used. None means the first GPU, or the one that belongs to this rank.
    """

    only_device: str | None = None

    @property
    def n_gpu(self) -> int:
        return min(int(super().n_gpu), 1)

    @property
    def device(self) -> torch.device:
        device = super().device  # it also sets up what else Trainer needs
        return device if self.only_device is None else torch.device(self.only_device)


def arguments(options: LoraOptions, device: torch.device, scratch: str) -> Arguments:
    """Trainer's settings for this process. `scratch` is the folder for its checkpoints."""
    batch_size, grad_accum = options.share(ranks.size())
    return Arguments(
        output_dir=scratch,
        only_device=str(device) if device.type == "cuda" and device.index is not None and ranks.size() == 1 else None,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=grad_accum,
        num_train_epochs=options.epochs,
        max_steps=-1 if options.steps is None else options.steps,
        learning_rate=options.lr,
        lr_scheduler_type={"plateau": "reduce_lr_on_plateau"}.get(options.schedule, options.schedule),
        weight_decay=0.0,
        max_grad_norm=options.clip,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        logging_steps=1,  # Trainer's own mean over more steps would not survive a resume
        logging_nan_inf_filter=False,  # it would hide that the training diverges
        save_strategy="no",  # the reporter says when
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,  # it would remove the teacher's predictions
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )


class TokenRows(Dataset[dict[str, Tensor]]):
    """The rows as a dataset for Trainer. The labels are the tokens themselves.

    The first token of a row and padding are not predicted. If the rows say which tokens belong to completions, the
    other tokens are not predicted either. One blank row follows the last row, and none of its tokens is predicted.
    With `likeliest`, a row also has the teacher's predictions behind each of its tokens.
    """

    def __init__(self, rows: Rows, likeliest: LikeliestTokens | None = None) -> None:
        self.rows, self.likeliest = rows, likeliest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        blank = index == len(self.rows)
        row = 0 if blank else index
        ids = self.rows.input_ids[row].long()
        predicted = torch.full(ids.shape, not blank)
        predicted[0] = False
        if self.rows.completion is not None:
            predicted &= self.rows.completion[row]
        given = {"input_ids": ids} | ({} if self.likeliest is None else self.likeliest[row])
        if self.rows.valid is None:
            return given | {"labels": ids.where(predicted, IGNORED)}
        valid = self.rows.valid[row]
        return given | {"attention_mask": valid.long(), "labels": ids.where(predicted & valid, IGNORED)}


class Order(Sampler[int]):
    """The order in which an epoch takes the rows. Every row comes once. Blank rows at the end give each rank the same
    number of batches.

    The order does not depend on the number of ranks.

    Args:
        seed: shuffles the rows, differently in each epoch. With None, the rows keep their order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int | None) -> None:
        whole = batch_size * ranks.size() if ranks.size() > 1 else 1
        self.rows, self.blank, self.seed, self.epoch = rows, -rows % whole, seed, 0

    def __len__(self) -> int:
        return self.rows + self.blank

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            yield from range(self.rows)
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from [self.rows] * self.blank


def _text_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """What this batch adds to the loss of an optimizer step. That loss is the mean over the tokens of all ranks."""
    return negative_log_likelihood(outputs.logits, labels) / num_items_in_batch


class StudentTrainer(Trainer):
    """A Trainer whose losses are means over tokens. They do not depend on batches and ranks.

    Attributes:
        match_weight: see `LoraOptions`.
    """

    match_weight = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, compute_loss_func=_text_loss)
        self.order = Order(len(kwargs["train_dataset"]), self.args.train_batch_size, self.args.seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _get_eval_sampler(self, eval_dataset: Any) -> Order:
        return Order(len(eval_dataset), self.args.eval_batch_size, None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what is trained. Trainer's own method would gather all weights of the ranks and add a pickle."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._trained().items()}
            save_file(tensors, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores what is trained. Trainer restores the rest."""
        if not (saved := Path(resume_from_checkpoint) / TRAINED).exists():
            raise BadInput("An earlier lolcats began this training and saved it in another way. Begin it with --force.")
        tensors = load_file(saved)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(tensors[name])

    def _trained(self) -> dict[str, Tensor]:
        model = cast("PreTrainedModel", self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Computes the mean loss over all tokens. Trainer's own method takes the mean of the batches' means."""
        model = cast("PreTrainedModel", self.model).eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                labels = inputs.pop("labels")
                total += negative_log_likelihood(model(**inputs, use_cache=False).logits, labels).item()
                count += int((labels[:, 1:] != IGNORED).sum())
        both = self.accelerator.reduce(torch.tensor([total, count], dtype=torch.float64, device=self.args.device))
        loss = (both[0] / both[1]).item()
        metrics = {f"{metric_key_prefix}_loss": loss}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]  # no predictions


class Distiller(StudentTrainer):
    """Trains on the teacher's predictions. The loss is the mean of KL(teacher || student) over tokens; with a
    `match_weight` below 1, cross-entropy of the next token has the rest of it.

    Where the rows bring the teacher's likeliest next tokens, the divergence is over these and one class for all others.
    Otherwise the teacher runs: it is the same model with its adapter switched off and softmax attention switched on.
    The validation loss is always the cross-entropy of the next token.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        real = labels != IGNORED
        given = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        given |= {"use_cache": False}
        if "log_probs" in inputs:
            found = model(**given).logits[:, :-1][real]
            loss = divergence_of_likeliest(found, *(inputs[name][:, :-1][real] for name in ("ids", "log_probs")))
        else:
            student = cast("PeftModel", self.model)
            with torch.no_grad(), as_teacher(student):
                wanted = student(**given).logits[:, :-1][real]
            found = model(**given).logits[:, :-1][real]
            loss = divergence(found, wanted)
        if self.match_weight < 1:
            of_text = F.cross_entropy(found.float(), labels[real], reduction="sum")
            loss = self.match_weight * loss + (1 - self.match_weight) * of_text
        return loss / cast(Tensor, num_items_in_batch) * ranks.size()  # the ranks' gradients are averaged


class Reporter(TrainerCallback):
    """Receives Trainer's events. It logs metrics, shows progress, takes checkpoints, and ends trainings that diverge.

    Attributes:
        initial: the loss of the first validation.
        loss: the loss of the last validation.
        evaluated: the number of steps before the last validation.
        losses: the training losses since the last one that was logged.
        since: when the work that the next checkpoint saves ended. Checkpoints measure their own cost from there.
    """

    def __init__(self, writer: ArtifactWriter | None, options: LoraOptions, order: Order) -> None:
        self.writer, self.options, self.order = writer, options, order
        self.checkpoints = None if writer is None else Checkpoints(writer)
        self.advance: Advance = lambda done=1, **figures: None
        self.initial, self.loss, self.evaluated = math.nan, math.nan, -1
        self.losses: list[float] = []
        self.since = 0.0

    def load(self, folder: Path) -> None:
        """Restores this object's state from a checkpoint. Trainer restores the rest."""
        vars(self).update(json.loads((folder / "reporter.json").read_text()))

    def log(self, **event: Any) -> None:
        if self.writer is not None:
            self.writer.log(**event)

    def check(self, what: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise diverged(f"the {what} loss is {loss}", step, self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.epoch = int(state.epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self.checkpoints is not None and self.checkpoints.due()
        agreed = ranks.most(2 if stopping.requested() else int(due))
        if agreed == 2:
            stopping.request("a signal to another rank")
        # There is no checkpoint after the last step: a Trainer that resumes there would train on.
        control.should_save = state.global_step < state.max_steps and agreed > 0
        self.advance(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated, self.loss = state.global_step, kwargs["metrics"]["eval_loss"]
        self.check("validation", self.loss, self.evaluated)
        if self.evaluated == 0:
            self.initial = self.loss
        self.log(event="validation", step=self.evaluated, loss=self.loss)
        self.since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.check("training", logs["loss"], state.global_step)
            self.losses.append(logs["loss"])
            self.advance(0, loss=logs["loss"])
            if state.global_step % max(1, state.max_steps // POINTS) == 0:
                mean = sum(self.losses) / len(self.losses)
                norm = float(logs["grad_norm"])
                self.log(event="train", step=state.global_step, loss=mean, grad_norm=norm, lr=logs["learning_rate"])
                self.losses = []
            self.since = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks.barrier()  # every rank has written its random numbers
        try:
            if self.checkpoints is not None:
                self._record(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.checkpoints)
        finally:
            ranks.barrier()
        stopping.check()

    def _record(self, folder: Path, checkpoints: Checkpoints) -> None:
        numbers = {name: getattr(self, name) for name in ("initial", "loss", "evaluated", "losses")}
        (folder / "reporter.json").write_text(json.dumps(numbers))
        checkpoints.record(folder, self.since)
