"""Every causal language model of transformers through the four stages, each with tiny random weights; and some models
around a text model.

    python benchmarks/families/run.py [--only llama,gpt2] [--again] [--write]

Every model type of MODEL_FOR_CAUSAL_LM_MAPPING runs in a process of its own, with a time limit: capture, transfer,
lora, merge, then the merged folder as transformers loads it: with and without a cache, in parts, padded, saved and
loaded again. What came out is added to benchmarks/results/families.csv; types that it holds already are left out unless
--again. --write makes docs/compatibility.md of it.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

RESULTS = ROOT / "benchmarks" / "results" / "families.csv"
TABLE = ROOT / "docs" / "compatibility.md"
VERSION = "5.23"
NO_SOFTMAX = "no softmax attention"  # of a reason: such types do not count
OUTCOMES = ("served", "refused", "failed", "no model")
# Models around a text model that transformers does not call causal language models.
WRAPPERS = ("glm4v", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
FIELDS = ("model_type", "class", "outcome", "stage", "seconds", "reason")
WORDS = "the whale and a ship at sea saw one white sail then two men sang of home".split()  # noqa: SIM905


def make_teacher(folder: Path, model_type: str) -> str:
    """Save a tiny teacher with its tokenizer; -> its class."""
    from tiny import tiny_model

    model = tiny_model(model_type)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return type(model).__name__


def make_tokenizer(folder: Path) -> None:
    """A token for each byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def stages(teacher: Path, text: Path, folder: Path, note: Callable[[str], None]) -> list[str]:
    """The four stages and the checks of what they made; `note` is called with the name of each before it runs. What
    does not hold of the teacher either is returned."""
    from lolcats_kernels import HybridConfig

    from lolcats_cli.loading.any_model import load_any
    from lolcats_cli.stages.capture import capture
    from lolcats_cli.stages.lora import lora
    from lolcats_cli.stages.lora_options import LoraOptions
    from lolcats_cli.stages.merge import merge
    from lolcats_cli.stages.transfer import transfer
    from lolcats_cli.stages.transfer_options import TransferOptions
    from lolcats_cli.teacher.load import LoadOptions
    from lolcats_cli.teacher.records import DataOptions

    note("capture")
    captured = capture(str(teacher), str(text), folder / "capture", options=DataOptions(seq_len=20, samples=6))
    note("transfer")
    hybrid = HybridConfig(window=6, feature_dim=8, linear_factor="exp")
    maps = transfer(captured.path, folder / "maps", options=TransferOptions(hybrid, steps=2, grad_accum=1))
    note("lora")
    rates = LoraOptions(steps=2, grad_accum=1, lr=1e-2, train_maps=True)
    adapted = lora(maps.path, folder / "lora", options=rates)
    note("merge")
    student = merge(adapted.path, folder / "student").path
    load = LoadOptions(device="cpu")
    return check_student(student, load_any(str(teacher), load).model, load_any(str(adapted.path), load).model, note)


def checks(model, tokens, logits) -> dict[str, Callable[[], None]]:
    """What should hold of a causal language model in whatever way it is asked, given its logits for some tokens."""
    import torch

    padded = torch.cat([torch.full((2, 5), 2), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0

    def same(found, expected) -> None:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def cached(lengths: list[int]) -> None:
        past, parts = None, []
        for part in tokens.split(lengths, 1):
            out = model(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        same(torch.cat(parts, 1), logits)

    def left() -> None:
        same(model(padded, attention_mask=mask).logits[:, 5:], logits)

    def right() -> None:
        found = model(torch.cat([tokens, padded[:, :5]], 1), attention_mask=mask.flip(1)).logits
        same(found[:, : tokens.shape[1]], logits)

    def beams() -> None:
        common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
        assert torch.equal(model.generate(padded, **common), model.generate(padded, use_cache=False, **common))

    def prefix() -> None:
        for length in (1, 7, 16):
            same(model(tokens[:, :length]).logits, logits[:, :length])
        changed = torch.cat([tokens[:, :16], tokens[:, 16:].flip(1)], 1)
        same(model(changed).logits[:, :16], logits[:, :16])

    return {
        "cached token by token": lambda: cached([9] + [1] * 14),
        "cached in parts": lambda: cached([9, 1, 13]),
        "padded on the left": left,
        "padded on the right": right,
        "beams": beams,
        "prefix = whole": prefix,
    }


def holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:
        return False
    return True


def check_student(folder: Path, teacher, unmerged, note: Callable[[str], None]) -> list[str]:
    """That a merged folder is the student in memory, and does what should hold. What holds neither of it nor of its
    teacher is returned."""
    import torch
    from transformers import AutoModelForCausalLM

    from lolcats_cli.loading.merged import load_merged
    from lolcats_cli.teacher.load import LoadOptions

    excused = []
    with torch.no_grad():
        note("load")
        student = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        tokens = torch.randint(3, 260, (2, 23), generator=torch.Generator().manual_seed(2))
        labels = tokens if holds(lambda: teacher(tokens, labels=tokens)) else None  # some want an image before them
        expected = student(tokens, labels=labels, use_cache=False)
        own = unmerged(tokens, use_cache=False).logits
        torch.testing.assert_close(expected.logits, own, atol=1e-4, rtol=1e-4)
        of_teacher = checks(teacher, tokens, teacher(tokens, use_cache=False).logits)
        for name, check in checks(student, tokens, expected.logits).items():
            note(name)
            try:
                check()
            except Exception as error:
                if holds(of_teacher[name]):
                    raise error from None
                excused.append(name)
        note("save, load")
        student.save_pretrained(folder.with_name("again"))
        again = AutoModelForCausalLM.from_pretrained(folder.with_name("again"), trust_remote_code=True).eval()
        for model in (again, load_merged(folder, LoadOptions(device="cpu"))):  # that with the code that is installed
            found = model(tokens, labels=labels, use_cache=False)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)
            if labels is not None:
                torch.testing.assert_close(found.loss, expected.loss)
    return excused


def run_one(model_type: str) -> dict[str, str]:
    """What becomes of one model type: served, with what holds neither of it nor of its teacher; refused, with the
    reason; failed, at a stage; or no model can be made."""
    import torch
    import transformers

    from lolcats_cli.errors import BadInput

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    row = SimpleNamespace(model_type=model_type, outcome="served", stage="", reason="")
    auto = transformers.models.auto.modeling_auto
    row.__dict__["class"] = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")

    def note(stage: str) -> None:
        row.stage = stage

    with tempfile.TemporaryDirectory() as scratch:
        teacher, text = Path(scratch) / "teacher", Path(scratch) / "text.txt"
        picks = torch.randint(0, len(WORDS), (200,), generator=torch.Generator().manual_seed(0))
        text.write_text(" ".join(WORDS[i] for i in picks))
        try:
            note("make")
            row.__dict__["class"] = make_teacher(teacher, model_type)
            excused = stages(teacher, text, Path(scratch), note)
        except Exception as error:
            refused = isinstance(error, BadInput) and row.stage == "capture"
            row.outcome = "no model" if row.stage == "make" else "refused" if refused else "failed"
            row.reason = f"{'' if refused else type(error).__name__ + ': '}{' '.join(str(error).split())}"[:400]
            row.reason = row.reason.replace(f"{scratch}/", "")
        else:
            row.stage, row.reason = "", ", ".join(excused)
    return vars(row)


def run_all(types: list[str], limit: float) -> None:
    """Every type in a process of its own, a copy of this one; each result is written when it is there."""
    import peft  # noqa: F401  # loaded once
    import transformers  # noqa: F401

    from lolcats_cli.stages import capture, lora, merge, transfer  # noqa: F401

    context = multiprocessing.get_context("fork")
    for number, model_type in enumerate(types, 1):
        begin = time.monotonic()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(theirs, model_type))
        process.start()
        theirs.close()
        try:
            done = ours.poll(limit)
            row = ours.recv() if done else {"outcome": "failed", "reason": f"it took more than {limit:.0f} s"}
        except EOFError:
            row = {"outcome": "failed", "reason": "its process ended"}
        process.kill()
        process.join()
        row |= {"model_type": model_type, "seconds": f"{time.monotonic() - begin:.0f}"}
        rows = {**read_results(), model_type: row}
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))
        print(f"{number}/{len(types)} {model_type}: {row['outcome']} {row.get('stage', '')}", row["reason"][:150])


def _send(pipe: Any, model_type: str) -> None:
    """Run one type with nothing printed; its result goes through the pipe."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        pipe.send(run_one(model_type))


def read_results() -> dict[str, dict[str, str]]:
    if not RESULTS.is_file():
        return {}
    with RESULTS.open(newline="") as file:
        return {row["model_type"]: row for row in csv.DictReader(file)}


def page() -> str:
    """docs/compatibility.md."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

    results = read_results()
    rows, wrappers = ([results[name] for name in sorted(names) if name in results] for names in (ALL, WRAPPERS))
    by_outcome = {name: [row for row in rows if row["outcome"] == name] for name in OUTCOMES}
    other = [row for row in by_outcome["refused"] if NO_SOFTMAX in row["reason"]]
    softmax = len(rows) - len(other) - len(by_outcome["no model"])
    share = 100 * len(by_outcome["served"]) / max(softmax, 1)
    lines = [
        "# Compatibility",
        "",
        f"The causal language models of transformers {VERSION}, {len(rows)} model types, with tiny random weights",
        "through the four stages; then the merged folder as transformers loads it: its logits are those of the student",
        "in memory, with a cache and without, token by token and in parts, padded on either side, by beams, and saved",
        "and loaded again; a prefix gives what the whole gives. This page is made anew by `python",
        f"benchmarks/families/run.py --again --write`; {len(ALL) - len(rows)} types were not run yet.",
        "",
        f"- {len(by_outcome['served'])} are served: {share:.1f}% of the {softmax} that have softmax attention, and of",
        "  which a tiny model could be made.",
        f"- {len(by_outcome['refused']) - len(other)} are refused before any work, for the reasons below; "
        f"{len(by_outcome['failed'])} fail later.",
        f"- {len(other)} have no softmax attention.",
        f"- Of {len(by_outcome['no model'])} no tiny model could be made.",
        "",
        "Hybrids have their softmax layers converted; their other layers stay, with their own states in the cache.",
        "Models for images or sound have their text model converted, and stay what they are around it. Attention",
        "sinks are kept. Latent attention (DeepSeek, Kimi, GLM) is recorded behind its up-projections. Layers that",
        "choose their keys by an indexer are captured with rows of which all keys are chosen; such a layer that stays",
        "softmax sees all. A sliding window of the teacher is imitated by the maps, or kept with `--keep-softmax",
        "sliding`. Students of RoPE `dynamic` and `longrope` keep the frequencies of the trained length at any length.",
        "",
        *table(rows),
        "",
        "## Models around a text model",
        "",
        "Those that transformers does not list as causal language models: loaded whole, trained on text, merged whole.",
        "",
        *table(wrappers),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a table, one for each row of the results."""
    lines = ["| model type | class | | |", "| --- | --- | --- | --- |"]
    for row in rows:
        reason = row["reason"].replace("|", "/").replace("<", "(").replace(">", ")")
        told = f"as in its teacher, not: {reason}" if row["outcome"] == "served" and reason else reason
        lines.append(f"| {row['model_type']} | {row['class']} | {row['outcome']} | {told} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between")
    parser.add_argument("--again", action="store_true", help="those too that the results hold")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md of the results")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    caches = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    os.environ |= {name: f"{caches}/{name.lower()}" for name in ("HF_HOME", "HF_MODULES_CACHE")}
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

    types = options.only.split(",") if options.only else [*ALL, *WRAPPERS]
    if options.only == "none":
        types = []
    run_all([name for name in types if options.again or name not in read_results()], options.limit)
    if options.write:
        TABLE.write_text(page())


if __name__ == "__main__":
    main()
