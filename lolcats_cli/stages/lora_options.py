"""The options of `lora`, and the recipes that choose them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lolcats_cli import ranks
from lolcats_cli.errors import UsageError


@dataclass(frozen=True)
class LoraOptions:
    """How the adapter is trained; the defaults are of the recipe "best".

    Attributes:
        rank, alpha, dropout, targets: PEFT's `r`, `lora_alpha`, `lora_dropout` and `target_modules`; without targets,
            all projections of the attentions.
        train_maps: train the feature maps and γ too.
        match: what the student's predictions are trained on: the "text" (next-token cross-entropy), or the "teacher"'s
            predictions on it (KL divergence). These are taken from a capture that stores them. Otherwise each batch
            costs one forward pass of the teacher more.
        match_weight: the share that matching the teacher has in the loss (Hinton's α, arXiv 1503.02531). Next-token
            cross-entropy has the rest.
        loss_on: "all" tokens, or those of a "completion" alone: the answers to prompts, the assistant's turns.
        full_attention: train all of the `targets` and the maps, without LoRA; `rank`, `alpha` and `dropout` do nothing.
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
    train_maps: bool = True
    match: str = "text"
    match_weight: float = 1.0
    loss_on: str = "all"
    full_attention: bool = False
    batch_size: int = 1
    grad_accum: int = 2
    epochs: int = 2
    steps: int | None = None
    lr: float = 5e-4
    clip: float = 1.0
    schedule: str = "plateau"
    eval_steps: int = 400
    seed: int = 0

    def share(self, processes: int) -> tuple[int, int]:
        """(rows per forward pass, passes per optimizer step) of each process. The processes share the rows of a step.

        Raises UsageError if they cannot share them evenly.
        """
        rows, rest = divmod(self.batch_size * self.grad_accum, processes)
        if rest or not rows:
            raise UsageError(
                f"An optimizer step has {self.batch_size * self.grad_accum} rows (--batch-size times --grad-accum), "
                f"which {processes} processes cannot share evenly. Take a multiple of {processes}, "
                f"as with --grad-accum {-(-self.grad_accum // processes) * processes}."
            )
        batch_size = max(size for size in range(1, self.batch_size + 1) if rows % size == 0)
        return batch_size, rows // batch_size


# The options that a recipe stands for. Options that are given win. "lolcats" has the paper's for 8B models, and "best"
# has those that gave better students with the same number of tokens (docs/quality.md).
RECIPES = {
    "best": LoraOptions(),
    "lolcats": LoraOptions(train_maps=False, grad_accum=8, lr=1e-4, eval_steps=100),
}


def in_full(options: LoraOptions) -> LoraOptions:
    """The options for training all of the attentions' projections. The rate and the tokens of a step are RADLADS'
    (arXiv 2505.03005, its published distill2.yaml) where it matches logits: 96 rows of 512 tokens at a rate that stays
    the same, 250 to 700 M tokens in all."""
    return replace(options, full_attention=True, lr=1e-5, grad_accum=48, eval_steps=100)


def check_processes(options: LoraOptions, data: str | Sequence[str] | None, shard: bool) -> None:
    """Raises UsageError for options that the processes of this training cannot have together."""
    options.share(ranks.size())
    if options.full_attention and shard:
        raise UsageError("--full-attention cannot be combined with --shard. Use larger GPUs, or train an adapter.")
    if ranks.size() > 1 and "-" in ([data] if isinstance(data, str) else data or ()):
        raise UsageError("Several processes cannot all read --data from stdin. Name a file.")
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate is set up for {engine}. Launch with --multi_gpu alone, and pass --shard to lolcats."
            )
