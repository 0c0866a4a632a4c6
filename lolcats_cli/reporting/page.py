"""One HTML page about a student: no script, nothing from the network, readable on a phone and printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from lolcats_formats import Artifact

from lolcats_cli import __version__
from lolcats_cli.artifacts.history import Step, figures, head_errors, history, layer_figures, number, transfer_summary
from lolcats_cli.artifacts.maps import hybrid_entry
from lolcats_cli.errors import BadInput
from lolcats_cli.progress import printable
from lolcats_cli.reporting.charts import Axis, Series, color_at, gradient, heatmap, label, line_chart
from lolcats_cli.student.memory import cache_bytes, student_bytes

if TYPE_CHECKING:
    from lolcats_cli.reporting.measure import Measured

CONTEXTS = tuple(2**power for power in range(8, 18))  # 256 to 131,072 tokens
SHOWN_CONTEXTS = (1024, 8192, 32768, 131072)
ITEMSIZE = {"float32": 4, "float64": 8}  # of a dtype; 2 for all others
ACCENT, WARM, COOL = "var(--accent)", "var(--warm)", "var(--cool)"
# The settings of each stage that change what comes out.
SETTINGS = {
    "capture": ("samples", "store", "stored", "logits", "dtype", "select", "keep", "seed"),
    "transfer": ("hybrid", "keep_softmax", "lr", "batch_size", "grad_accum", "epochs", "steps", "seed"),
    "lora": ("rank", "alpha", "targets", "full_attention", "train_maps", "match", "match_weight", "logits",
             "loss_on", "lr", "batch_size", "grad_accum", "epochs", "steps", "seed"),
    "student": ("keep_softmax",),
}  # fmt: skip


def page(artifact: Artifact, measured: Measured | None = None) -> str:
    """The page about a transfer, a LoRA or a merged student.

    Raises BadInput for an artifact whose configuration does not describe a student.
    """
    steps = history(artifact)
    by_kind = {step.kind: step for step in reversed(steps)}  # the nearest of each kind
    memory = _Memory(artifact, by_kind)
    name = _name(artifact)
    body = [
        f"<h1>{name}, linearized</h1>",
        f'<p class="soft">A {artifact.kind} artifact, <code>{artifact.id[:12]}</code>, made by '
        f"{_text(artifact.manifest['created']['tool'])} on {_text(artifact.manifest['created']['time'][:10])}.</p>",
        _tiles(steps, memory, measured),
        *_lineage(artifact, steps),
        *_transfer(by_kind.get("transfer")),
        *_lora(by_kind.get("lora")),
        *_heads(transfer_summary(steps)),
        *_quality(measured),
        *_memory(memory, measured),
    ]
    style = resources.files("lolcats_cli.reporting").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>' + name + " – lolcats report</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>\n{style}</style></head>\n<body><main>\n" + "\n".join(body) + "\n"
        f'<p class="soft">Written by lolcats {__version__}. Its docs/glossary.md explains the words.</p>'
        "</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Text of an artifact, for HTML."""
    return escape(printable(str(value), keep="\n"))


def _name(artifact: Artifact) -> str:
    teacher = artifact.teacher
    return _text(
        teacher.get("name") or str(teacher.get("path") or teacher.get("architecture")).rstrip("/").split("/")[-1]
    )


def _tiles(steps: Sequence[Step], memory: _Memory, measured: Measured | None) -> str:
    """The four most important figures."""
    found: list[tuple[str, str]] = []
    results = measured.results if measured else {}
    if "student" in results:
        beside = "" if "teacher" not in results else f" (teacher {_perplexity(results['teacher'])})"
        found.append((_perplexity(results["student"]), f"perplexity on held-out text{beside}"))
        recall = results["student"]["recall"]
        if recall:
            farthest = list(recall)[-1]
            found.append((f"{recall[farthest]:.0%}", f"of facts {farthest} tokens back are recalled"))
    else:
        for figure in figures(step for step in steps if step.kind == "lora"):
            if "perplexity" in figure.name:
                found.append((figure.value, "validation perplexity, before → after LoRA"))
    layers = layer_figures(transfer_summary(steps))
    errors = [layer["relative_mse"] for layer in layers.values() if "relative_mse" in layer]
    if errors:
        found.append((f"{sum(errors) / len(errors):.1%}", "attention error after transfer, mean of the layers"))
    found.append(
        (label(memory.student(32768), "B"), f"state at 32K tokens (teacher {label(memory.teacher(32768), 'B')})")
    )
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in found)
        + "</div>"
    )


def _perplexity(result: dict[str, Any]) -> str:
    return "–" if result["perplexity"] is None else f"{result['perplexity']:#.4g}"


def _section(title: str, words: str, *parts: str) -> list[str]:
    return [f"<h2>{title}</h2>", f"<p>{words}</p>", *parts]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll card">{table}</div>'


def _details(summary: str, content: str) -> str:
    """Content that is folded until it is opened."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def _quote(text: str, kind: str = "") -> str:
    return f'<div class="card"><blockquote class="{kind}">{_text(text)}</blockquote></div>'


def _lineage(artifact: Artifact, steps: Sequence[Step]) -> list[str]:
    teacher, trained_on = artifact.teacher, artifact.data
    data = next((step.artifact.data for step in reversed(steps) if step.artifact), trained_on)
    rows = [
        ["teacher", f"{_text(teacher.get('architecture'))}, {len(teacher.get('layers', []))} layers<br>"
         f"<code>{_text(teacher.get('path'))}</code>",
         f"weights <code>{_text(str(teacher.get('weights_sha256'))[:12])}</code>", ""],
        ["data", f"<code>{_text(data.get('path'))}</code>", _data(data), ""],
    ]  # fmt: skip
    if trained_on.get("tokens_sha256") != data.get("tokens_sha256"):
        rows.append(["data of the LoRA", f"<code>{_text(trained_on.get('path'))}</code>", _data(trained_on), ""])
    for step in reversed(steps):
        said = "<br>".join(f"{_text(figure.name)}: <b>{_text(figure.value)}</b>" for figure in figures([step]))
        settings = _settings(step.artifact.config, SETTINGS[step.kind]) if step.artifact else ""
        gone = "" if step.artifact else '<br><span class="note">no longer there</span>'
        rows.append(
            [step.kind, f"<code>{step.id[:12]}</code>{gone}<br><code>{_text(step.path)}</code>", settings, said]
        )
    parts = [_table(["", "what and where", "settings", "results"], rows, "words")]
    missing = [step.kind for step in steps if step.artifact is None]
    if missing:
        parts.append(
            f'<p class="note">Not found where it lay, nor beside this artifact: {", ".join(missing)}. Its settings, '
            "curves and results are not shown. Put it back and write the report again.</p>"
        )
    for step in steps:
        if step.artifact:
            config = f"<code>{_text(json.dumps(step.artifact.config, indent=2))}</code>"
            parts.append(_details(f"all settings of the {step.kind}", f"<blockquote>{config}</blockquote>"))
    return _section("Lineage", "What this was made from, in the order in which it was made.", *parts)


def _settings(values: dict[str, Any], names: Sequence[str]) -> str:
    """The settings with these names as "name value" pairs; nested ones by their own names."""
    pairs: list[tuple[str, Any]] = []
    for name in names:
        value = values.get(name)
        if isinstance(value, dict):
            pairs += value.items()
        elif isinstance(value, bool):
            pairs.append((name, "yes" if value else "no"))
        elif isinstance(value, list):
            pairs.append((name, ("-" if name == "samples" else ", ").join(map(str, value))))  # samples: first and last
        elif value is not None:
            pairs.append((name, value))
    return ", ".join(f"{_text(name)}&nbsp;<b>{_text(value)}</b>" for name, value in pairs)


def _data(data: dict[str, Any]) -> str:
    counts = data.get("rows")
    rows = (
        ", ".join(f"<b>{n}</b> for {_text(split)}" for split, n in counts.items()) if isinstance(counts, dict) else "?"
    )
    return f"rows: {rows}, of <b>{_text(data.get('seq_len'))}</b> tokens"


def _points(events: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the events that have the value."""
    found = ((number(event.get("step")), number(event.get(name))) for event in events)
    return [(step, value) for step, value in found if step is not None and value is not None]


def _transfer(step: Step | None) -> list[str]:
    if step is None or step.artifact is None:
        return []
    events = step.artifact.metrics()
    layers = sorted({event["layer"] for event in events if isinstance(event.get("layer"), int)})
    if not layers:
        return []

    def chart(title: str, kind: str, name: str, y: Axis) -> str:
        series = [
            Series(
                f"layer {layer}",
                _points((e for e in events if e.get("layer") == layer and e.get("event") == kind), name),
                color_at(place / max(1, len(layers) - 1)),
            )
            for place, layer in enumerate(layers)
        ]
        return line_chart(title, series, Axis("optimizer step"), y, gradient(f"layer {layers[0]}", str(layers[-1])))

    charts = [
        chart("Validation error of every layer", "validation", "mse", Axis("mean squared error", log=True)),
        chart("Training loss", "train", "loss", Axis("loss", log=True)),
        chart("Gradient norm", "train", "grad_norm", Axis("norm before clipping", log=True)),
        chart("Learning rate", "train", "lr", Axis("learning rate", log=True))
        or chart("Learning rate", "validation", "lr", Axis("learning rate", log=True)),
    ]
    words = "Every layer's feature maps learn to give the output of the teacher's softmax attention."
    return _section("Attention transfer", words, f'<div class="grid2">{"".join(charts)}</div>')


def _lora(step: Step | None) -> list[str]:
    if step is None or step.artifact is None:
        return []
    events = step.artifact.metrics()
    trained = [event for event in events if event.get("event") == "train"]
    validated = _points((e for e in events if e.get("event") == "validation"), "loss")
    steps, loss = Axis("optimizer step"), Axis("nats per token")
    both = [Series("training", _points(trained, "loss"), COOL), Series("validation", validated, WARM)]
    charts = [
        line_chart("Loss", both, steps, loss),
        line_chart(
            "Gradient norm", [Series("norm", _points(trained, "grad_norm"), ACCENT)], steps, Axis("before clipping")
        ),
        line_chart(
            "Learning rate", [Series("rate", _points(trained, "lr"), ACCENT)], steps, Axis("learning rate", log=True)
        ),
    ]
    words = "A LoRA adapter is trained end to end, with the transferred attentions in place."
    return _section("LoRA", words, f'<div class="grid2">{"".join(charts)}</div>')


def _heads(summary: dict[str, Any]) -> list[str]:
    layers, heads = layer_figures(summary), head_errors(summary)
    if not layers:
        return []
    alone = {"relative_mse": ("with both terms", ACCENT, False), "relative_window_mse": ("window alone", WARM, True)}
    series = [
        Series(name, [(n, layer[key]) for n, layer in layers.items() if key in layer], color, dashed)
        for key, (name, color, dashed) in alone.items()
    ]
    charts = [
        heatmap("Error of every head", [(str(n), row) for n, row in heads.items()], "head", "layer"),
        line_chart("Error by layer", series, Axis("layer"), Axis("squared error / power", log=True, unit="%")),
    ]
    columns = {
        "relative_mse": ("error", "%"),
        "relative_window_mse": ("window alone", "%"),
        "heads_off": ("heads off", ""),
        "entropy": ("entropy, nats", ""),
        "steps": ("steps", ""),
    }
    shown = {key: value for key, value in columns.items() if any(key in layer for layer in layers.values())}
    rows = [
        [str(n), *(label(layer[key], unit) if key in layer else "–" for key, (_, unit) in shown.items())]
        for n, layer in layers.items()
    ]
    words = (
        "The squared error of the attention's output on the validation rows, beside the power of the softmax output. "
        "0% is the teacher's own output; the window alone is the student with its linear term zeroed."
    )
    table = _table(["layer", *(name for name, _ in shown.values())], rows)
    return _section(
        "Error by layer and head",
        words,
        f'<div class="grid2">{"".join(charts)}</div>',
        _details("as a table", table),
    )


def _quality(measured: Measured | None) -> list[str]:
    if measured is None:
        words = "Perplexity, recall and samples were not measured. Add <code>--data FILE</code> with held-out text."
        return [f'<h2>Against the teacher</h2><p class="note">{words}</p>']
    order = sorted(measured.results, key=lambda name: (name != "teacher", name != "student"))
    distances = list(dict.fromkeys(d for result in measured.results.values() for d in result["recall"]))
    rows = []
    for name in order:
        result = measured.results[name]
        error = f"{result['relative_attention_mse']:.1%}" if name != "teacher" else "–"
        recall = [f"{result['recall'][d]:.0%}" if d in result["recall"] else "–" for d in distances]
        rows.append([name, _perplexity(result), f"{result['nats_per_token']:.4f}", error, *recall])
    header = ["", "perplexity", "nats per token", "attention error", *(f"recall@{d}" for d in distances)]
    parts = [_table(header, rows)]
    if measured.without_teacher:
        parts.append(f'<p class="note">The teacher could not be run: {_text(measured.without_teacher)}</p>')
    parts += _section("Samples", "The prompt is the beginning of the data:", _quote(measured.prompt, "soft"))
    for name in sorted(measured.samples, key=lambda name: name != "teacher"):
        parts += [
            f'<p class="soft">{name}, the likeliest token every time:</p>',
            _quote(measured.samples[name].strip("\n")),
        ]
    words = (
        f"On {measured.rows:,} rows, {measured.tokens:,} tokens, of <code>{_text(', '.join(measured.data))}</code>. "
        "recall@N is how often a fact that was stated N tokens ago is named."
    )
    return _section("Against the teacher", words, *parts)


class _Memory:
    """Bytes that one sequence takes, from the sizes in the manifest."""

    def __init__(self, artifact: Artifact, by_kind: dict[str, Step]) -> None:
        self.layers = artifact.teacher.get("layers", [])
        self.kept = artifact.config.get("keep_softmax", [])
        lora = by_kind.get("lora")
        self.dtype = "bfloat16"  # where nothing tells
        if artifact.kind == "student":
            self.dtype = str(artifact.read_json("config.json").get("dtype", self.dtype))
        elif lora is not None and lora.artifact is not None:
            self.dtype = str(lora.artifact.config.get("dtype", self.dtype))
        self.itemsize = ITEMSIZE.get(self.dtype, 2)
        try:
            self.hybrid = hybrid_entry(artifact)
            self.student(1)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadInput(
                f"{artifact.path} does not describe the attention of its student ({error}). Make it again."
            ) from error

    def teacher(self, tokens: int) -> int:
        return cache_bytes(self.layers, tokens, self.itemsize)

    def student(self, tokens: int) -> int:
        return student_bytes(self.layers, self.hybrid, self.kept, tokens, self.itemsize, on_gpu=True)


def _memory(memory: _Memory, measured: Measured | None) -> list[str]:
    series = [
        Series("teacher's KV cache", [(n, memory.teacher(n)) for n in CONTEXTS], WARM),
        Series("student's state", [(n, memory.student(n)) for n in CONTEXTS], ACCENT),
    ]
    chart = line_chart(
        "Bytes of one sequence", series, Axis("tokens of context", log=True), Axis("", log=True, unit="B")
    )
    rows = []
    for n in SHOWN_CONTEXTS:
        teacher, student = memory.teacher(n), memory.student(n)
        rows.append(
            [f"{n:,}", label(teacher, "B"), label(student, "B"), f"{teacher / student:.3g}×" if student else "–"]
        )
    parts = [_table(["context", "teacher's KV cache", "student's state", "ratio"], rows)]
    if measured and measured.speed:
        contexts = sorted({context for found in measured.speed.values() for context in found})
        names = sorted(measured.speed, key=lambda name: name != "teacher")
        cells = [
            [f"{context:,}", *(f"{measured.speed[name].get(context, math.nan):.3g}" for name in names)]
            for context in contexts
        ]
        parts.append(_table(["context", *(f"{name}, tokens/s" for name in names)], cells))
        parts.append(f'<p class="soft">Decoding of one sequence, measured on {_text(measured.device)}.</p>')
    words = f"What one sequence keeps in memory while text is generated, with keys and values in {_text(memory.dtype)}."
    return _section("Memory and speed", words, f'<div class="grid2">{chart}<div>{"".join(parts)}</div></div>')
