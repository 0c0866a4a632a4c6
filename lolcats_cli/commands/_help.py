"""How commands show their help: options in groups, an example, and summaries that are not cut off."""

from __future__ import annotations

import math
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MAX_INTEGER, MAX_FLOAT = 2**32 - 1, 1e9  # of an option; the former is the largest seed

# The heading of each group, and the options that come below it; others come first, as "Options".
GROUPS = {
    "Data": "data seq_len samples pack format template text_field subset split on_bad_row val_fraction select keep",
    "What is stored": "store store_dtype store_logits statistics disk memory",
    "Attention": "feature_map feature_dim feature_dims window windows layout linear_factor decay gamma layers "
    "keep_softmax",
    "Adapter": "rank alpha dropout targets full_attention",
    "Training": "recipe mse_factor xent_factor window_dropout train_maps match match_weight loss_on batch_size "
    "grad_accum epochs steps lr schedule eval_steps patience log_to",
    "Model and device": "teacher revision trust_remote_code dtype device devices device_map shard "
    "gradient_checkpointing block_size seed",
    "Result": "resume force max_shard_size json",
    "Every command": "config quiet verbose debug help",
}

# One or two lines that a reader may copy, by command.
EXAMPLES = {
    "plan": ["lolcats plan meta-llama/Llama-3.1-8B --tokens 20M --gpus 1xA100-40GB"],
    "capture": [
        "lolcats capture meta-llama/Llama-3.1-8B data.jsonl -o cap",
        "lolcats capture TEACHER 'corpus/*.parquet' -o cap --samples 5000 --store tokens",
    ],
    "transfer": [
        "lolcats transfer cap -o maps",
        "lolcats transfer cap -o maps --windows auto --feature-dims auto",
        "lolcats transfer cap -o maps --recipe lolcats --window 32",
    ],
    "lora": ["lolcats lora maps -o lora", "lolcats lora maps -o lora --rank 4 --match teacher"],
    "merge": ["lolcats merge lora -o student"],
    "join": ["lolcats join maps-a maps-b -o maps"],
    "rank": ["lolcats rank cap"],
    "inspect": ["lolcats inspect maps", "lolcats inspect maps --layer 3 --json"],
    "verify": ["lolcats verify student"],
    "report": [
        "lolcats report student -o report.html",
        "lolcats report student -o report.html --data held-out.jsonl",
    ],
    "eval": ["lolcats eval student --data held-out.jsonl", "lolcats eval student --tasks paper"],
    "generate": [
        'lolcats generate student --prompt "Call me" --temperature 0.8 --top-p 0.95',
        "lolcats generate student --chat",
    ],
    "import": ["lolcats import distill.pt --teacher meta-llama/Llama-3.1-8B -o maps"],
    "demo": ["lolcats demo --keep demo"],
}


class Command(TyperCommand):
    """A command with grouped help, whose numbers are finite and of sane size: Typer's ranges let NaN through, and few
    have an end."""

    def invoke(self, ctx: Any) -> Any:
        self.check_numbers(ctx)
        return super().invoke(ctx)

    def check_numbers(self, ctx: Any) -> None:
        """Raise a usage error for a number of the context's parameters that is not finite, or too large."""
        for param in self.params:
            named: Any = param
            value = ctx.params.get(param.name or "")
            if not isinstance(value, int | float):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number.", ctx, named)
            if abs(value) > (MAX_FLOAT if isinstance(value, float) else MAX_INTEGER):
                raise typer.BadParameter(f"{str(value)[:40]} is too large a number.", ctx, named)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", "Options", *GROUPS)}
        headings = {option: heading for heading, options in GROUPS.items() for option in options.split()}
        params = self.get_params(ctx)
        names = {param.name for param in params}
        if "epochs" not in names:  # a command that does not train
            headings["batch_size"] = "Model and device"
        if "select" not in names:  # the demo's --keep is not capture's
            del headings["keep"]
        for param in params:
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                groups["Arguments" if argument else headings.get(param.name or "", "Options")].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        examples = EXAMPLES.get(self.name or "", [])
        if examples:
            with formatter.section("Examples" if len(examples) > 1 else "Example"):
                for line in examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(TyperGroup):
    """The list of commands, each with the whole first paragraph of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        first = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(text.split())) for name, text in first])
