"""lolcats demo"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats_cli.commands import _options as o
from lolcats_cli.commands.eval import table

ASSETS = Path(__file__).parent.parent / "assets"
TEACHER, TRAIN, VALIDATION = ASSETS / "teacher", ASSETS / "text" / "train.jsonl", ASSETS / "text" / "validation.jsonl"
# Sized for five minutes on two cores. The README shows the table that these sizes give.
SAMPLES, TRANSFER_STEPS, LORA_STEPS, EVAL_ROWS, RECALL_ROWS = 96, 200, 80, 32, 32


def demo(
    ctx: typer.Context,
    keep: Annotated[
        Path | None, typer.Option(help="Keep all artifacts here; otherwise only the merged model is kept.")
    ] = None,
) -> None:
    """Run the four stages on the small model and text of this package, and compare teacher and student."""
    started = time.monotonic()
    root = keep or Path(tempfile.mkdtemp(prefix="lolcats-demo-"))
    capture, untrained, maps, lora, student = (
        str(root / name) for name in ("capture", "untrained", "transfer", "lora", "student")
    )
    stages = [
        ["capture", str(TEACHER), str(TRAIN), "-o", capture, "--samples", str(SAMPLES), "--dtype", "float32"],
        ["transfer", capture, "-o", maps, "--steps", str(TRANSFER_STEPS), "--eval-steps", "100", "--window", "64"],
        ["lora", maps, "-o", lora, "--steps", str(LORA_STEPS), "--eval-steps", "80", "--dtype", "float32"],
        ["merge", lora, "-o", student],
    ]
    # As published: the default recipe starts from what the teacher's softmax does.
    swapped = ["transfer", capture, "-o", untrained, "--steps", "0", "--recipe", "lolcats"]
    for args in [stages[0], swapped, *stages[1:]]:
        _run(ctx, args)

    results = {}
    for name, path, terms in (
        ("teacher (softmax)", str(TEACHER), ("both",)),
        ("swapped, no transfer", untrained, ("both",)),
        ("after transfer", maps, ("both",)),
        ("after LoRA", student, ("both", "window")),
    ):
        figures = _evaluate(path, terms)
        results[name] = figures["both"]
        if "window" in figures:
            results[f"{name}, linear term zeroed"] = figures["window"]

    prompt, samples = _samples({"teacher": str(TEACHER), "student": student})
    print(f"\nHeld-out text ({VALIDATION.name})\n\n{table(results)}\n\nPrompt:  {prompt}")
    for name, text in samples.items():
        print(f"\n{name.capitalize()}: {text}")
    print("\nThe commands that ran:\n")
    for args in stages:
        print(f"  {shlex.join(['lolcats', *args])}")
    print(f"\nThe student is in {student}. In Python:\n")
    print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"  model = AutoModelForCausalLM.from_pretrained({student!r}, trust_remote_code=True)")
    print(f"  tokenizer = AutoTokenizer.from_pretrained({student!r}, trust_remote_code=True)")
    print(f"\n{time.monotonic() - started:.0f} seconds in all.")
    if keep is None:
        for path in (capture, untrained, maps, lora):
            shutil.rmtree(path)


def _run(ctx: typer.Context, args: list[str]) -> None:
    """Runs one command of this program as the shell would. Its result goes to stderr."""
    print(f"\n$ {shlex.join(['lolcats', *args])}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        ctx.find_root().command.main(args, prog_name="lolcats", standalone_mode=False)


def _evaluate(path: str, terms: tuple[str, ...]) -> dict[str, Any]:
    from lolcats_cli.evaluation.evaluate import evaluate
    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions
    from lolcats_cli.teacher.records import DataOptions

    o.progress().note(f"loading {path}")
    found = evaluate(
        load_any(path, LoadOptions(dtype="float32")),
        str(VALIDATION),
        options=DataOptions(samples=EVAL_ROWS),
        terms=terms,
        recall_count=RECALL_ROWS,
        progress=o.progress(),
    )
    results: dict[str, Any] = found["results"]
    return results


def _samples(models: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A prompt from the held-out text, and the continuation by each model."""
    import json

    from lolcats_cli.evaluation.generate import generate
    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.teacher.load import LoadOptions

    text = json.loads(VALIDATION.read_text(encoding="utf-8").splitlines()[0])["text"]
    prompt = " ".join(text.split()[:60])
    return prompt, {
        name: generate(load_any(path, LoadOptions(dtype="float32")), prompt, max_new_tokens=60)
        for name, path in models.items()
    }
