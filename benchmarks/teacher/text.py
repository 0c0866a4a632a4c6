"""Writes the demo's text: documents of about 1000 tokens of grade-school problems, with facts woven in.

    python benchmarks/teacher/text.py --texts DIR [--out lolcats_cli/assets]

``train.jsonl`` comes from the part of the texts the teacher was trained on, ``validation.jsonl`` from the held-out part
alone, with (name, answer) pairs that no training text holds. Needs the teacher's tokenizer, for the lengths.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from corpus import Prose, read_texts, weave  # noqa: E402

from lolcats_cli.evaluation.recall import FactTokens  # noqa: E402

TEXT = "gsm8k"
LENGTH = 1000  # tokens per document, about
TRAINING_TOKENS = 440_000


def documents(prose: Prose, tokenizer: object, rng: random.Random, *, evaluation: bool) -> list[list[int]]:
    """The whole text, cut into documents, each with three facts that come back every 80 tokens or later."""
    tokens = FactTokens(tokenizer)
    result, start = [], 0
    while start < len(prose.ids) - LENGTH // 2:
        ids, _, start = weave(
            prose, start, LENGTH, tokens, rng, facts=3, gap=80, spacing=(4, 16), evaluation=evaluation
        )
        result.append(ids)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder with the three novels, the plays and gsm8k")
    parser.add_argument("--out", type=Path, default=ROOT / "lolcats_cli" / "assets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = read_texts(args.texts)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "teacher")
    for part, name in enumerate(("train", "validation")):
        rng = random.Random(f"{args.seed} {name}")
        prose = Prose.encode(tokenizer, texts[TEXT][part])
        chosen = documents(prose, tokenizer, rng, evaluation=part == 1)
        rng.shuffle(chosen)
        if part == 0:
            chosen = chosen[: TRAINING_TOKENS // LENGTH]
        folder = args.out / "text"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False) for ids in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(chosen)} documents, {sum(map(len, chosen))} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
