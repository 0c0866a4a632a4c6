"""What holding the sums of a student's state in a smaller dtype would cost: perplexity and recall, token by token.

    python benchmarks/state_dtype.py STUDENT results.csv [--rows 32] [--distance 512]

STUDENT is of the embedded teacher. A server rounds the sums after every token that it decodes. The rows are those of
`lolcats eval`: facts, held-out text, and a question about one of them; perplexity is of all tokens but the first 64.
"""

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import torch
from attention import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

import lolcats_cli
from lolcats_cli.evaluation.recall import recall_rows

TEXT = Path(lolcats_cli.__file__).parent / "assets" / "text" / "validation.jsonl"
COLUMNS = ("machine", "torch", "state", "rows", "tokens", "perplexity", "recalled")
SKIPPED = 64  # tokens that see no sums


@torch.inference_mode()
def measure(model, rows, dtype: torch.dtype | None) -> tuple[float, float]:
    """(perplexity, share of facts recalled), the sums rounded to `dtype` after every token."""
    ids, cache, loss = rows.input_ids, model.new_cache(), []
    hit = torch.ones(len(ids), dtype=torch.bool)
    for t in range(ids.shape[1] - 1):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0].float()
        if t >= SKIPPED:
            loss.append(torch.nn.functional.cross_entropy(logits, ids[:, t + 1], reduction="none"))
        hit &= (logits.argmax(-1) == ids[:, t + 1]) | ~rows.answer[:, t + 1]
        for layer in cache.layers if dtype else ():
            state = layer.state
            layer.state = replace(state, sums=state.sums.to(dtype).float(), norms=state.norms.to(dtype).float())
    return torch.stack(loss).mean().exp().item(), hit.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("results")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--distance", type=int, default=512)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.student, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.student, trust_remote_code=True)
    text = " ".join(json.loads(line)["text"] for line in TEXT.read_text().splitlines())
    filler = torch.tensor(tokenizer(text)["input_ids"])
    rows = recall_rows(tokenizer, filler, distance=arguments.distance, count=arguments.rows, seed=0)
    found = []
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        perplexity, recalled = measure(model, rows, dtype)
        common = (machine(), torch.__version__, name, *rows.input_ids.shape)
        found.append((*common, f"{perplexity:.3f}", f"{recalled:.3f}"))
        print(*found[-1][2:], sep="\t")
    with open(arguments.results, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *found])


if __name__ == "__main__":
    main()
