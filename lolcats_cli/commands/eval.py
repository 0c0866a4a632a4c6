"""lolcats eval"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lolcats_cli.commands import _checks as checks
from lolcats_cli.commands import _options as o
from lolcats_cli.commands._tables import table as columns
from lolcats_cli.errors import UsageError


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A teacher, a transfer or LoRA artifact, a merged folder, or - to read its path from stdin."
        ),
    ],
    data: Annotated[list[str] | None, typer.Option(help="Held-out data, as for capture (repeatable).")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Run these lm_eval tasks instead, such as piqa,arc_easy or task.yaml; paper: the LoLCATs paper's six."
        ),
    ] = None,
    seq_len: o.SeqLen = 1024,
    samples: Annotated[int | None, typer.Option(min=1, help="The most rows to take, or questions per task.")] = None,
    pack: o.Pack = True,
    format: o.Format = "auto",
    template: o.Template = "auto",
    text_field: o.TextField = "text",
    subset: o.Subset = None,
    split: o.Split = "train",
    on_bad_row: o.OnBadRow = "error",
    recall: Annotated[int, typer.Option(min=0, help="Rows per recall distance; 0 leaves recall out.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 4,
    teacher: o.Teacher = None,
    revision: Annotated[str | None, typer.Option(help="The hub revision of a teacher.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    device_map: o.DeviceMap = None,
    seed: o.Seed = 0,
) -> dict[str, Any]:
    """Measure perplexity and recall, or run tasks. A student is also measured with its window or linear term alone."""
    asked = locals()
    if (data is None) == (tasks is None):
        raise UsageError("There is nothing to measure. Give --data, or --tasks.")
    given = o.artifact_path(model, data)
    checks.model(given, teacher)
    checks.data(data)

    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    load = o.chosen(LoadOptions(), asked)
    if tasks is not None:
        from lolcats_cli.evaluation.lm_eval_tasks import load_tasks, run_tasks

        wanted = load_tasks(tasks.split(","))
        o.progress().note(f"loading {given}")
        loaded = load_any(given, load, teacher=teacher, revision=revision)
        figures = run_tasks(loaded, wanted, samples=samples, batch_size=batch_size, seed=seed)
        return {"path": given, "results": figures}
    assert data is not None

    from lolcats_cli.evaluation.evaluate import evaluate as run
    from lolcats_cli.teacher.records import DataOptions

    o.progress().note(f"loading {given}")
    found = run(
        load_any(given, load, teacher=teacher, revision=revision),
        data,
        options=o.chosen(DataOptions(), asked),
        batch_size=batch_size,
        recall_count=recall,
        seed=seed,
        progress=o.progress(),
    )
    return {"path": given, **found}


def show(found: dict[str, Any], as_json: bool) -> None:
    """Prints the results of `evaluate`, as a table or as JSON."""
    of_tasks = any("shots" in figures for figures in found["results"].values())
    shown = task_table if of_tasks else table
    print(json.dumps(found) if as_json else shown(found["results"]))


def task_table(results: dict[str, dict[str, Any]]) -> str:
    """Accuracies by task, with their standard errors if there are any."""
    rows = [["", "shots", "acc", "acc_norm"]]
    for name, figures in results.items():
        errors = {key: f" ± {figures[f'{key}_stderr']:.1%}" for key in rows[0] if f"{key}_stderr" in figures}
        cells = [f"{figures[key]:.1%}{errors.get(key, '')}" if key in figures else "-" for key in rows[0][2:]]
        rows.append([name, str(figures["shots"]), *cells])
    return columns(rows)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results by name as a table: perplexity, nats per token, attention error, recall by distance."""
    distances = list(dict.fromkeys(d for figures in results.values() for d in figures["recall"]))
    header = ["", "perplexity", "nats/token", "attention MSE", "relative", *(f"recall@{d}" for d in distances)]
    rows = [header]
    for name, figures in results.items():
        error = figures["standard_error"]
        rows.append(
            [
                name,
                "-" if figures["perplexity"] is None else f"{figures['perplexity']:.4g}",
                f"{figures['nats_per_token']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                f"{figures['attention_mse']:.3g}",
                f"{figures['relative_attention_mse']:.1%}",
                *(f"{figures['recall'][d]:.0%}" if d in figures["recall"] else "-" for d in distances),
            ]
        )
    return columns(rows)
