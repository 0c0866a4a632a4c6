"""A second teacher, of another architecture: Qwen3's, which normalises queries and keys head by head.

    python benchmarks/quality/second_teacher.py DIR [--rows 800]

It starts from the embedded Llama's weights, so that it need not learn recall from nothing; the norms, which are new,
start with the mean size of what they normalise. All weights are then trained on the embedded text. One seed, no resume.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from lab import ASSETS, LOAD, SEQ_LEN, TRAIN
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from lolcats_cli.teacher.data import DataOptions, read_rows
from lolcats_cli.teacher.load import load_model, load_tokenizer

FIRST = ASSETS / "teacher"
BATCH, LR = 4, 3e-4  # rows a step; falls linearly to 0, after a warm-up of a tenth


@torch.no_grad()
def from_llama(rows: torch.Tensor) -> Qwen3ForCausalLM:
    llama = load_model(FIRST, LOAD)
    given = llama.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rope_parameters")
    names += ("bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps")
    model = Qwen3ForCausalLM(Qwen3Config(**{name: getattr(given, name) for name in names}))
    sizes: dict[str, float] = {}

    def record(name: str, out: torch.Tensor) -> None:
        heads = out.unflatten(-1, (-1, given.head_dim))
        sizes[name] = heads.square().mean(-1).sqrt().mean().item()

    for name, module in llama.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda module, args, out, name=name: record(name, out))
    llama(input_ids=rows)
    state = dict(llama.state_dict())
    for name, size in sizes.items():
        state[name.replace("_proj", "_norm") + ".weight"] = torch.full((given.head_dim,), size)
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=800)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = read_rows(str(TRAIN), load_tokenizer(FIRST), DataOptions(SEQ_LEN)).input_ids.long()
    order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-args.rows // len(rows)))])[: args.rows]
    model = from_llama(rows[:2]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    steps = args.rows // BATCH
    for step, batch in enumerate(order[: steps * BATCH].split(BATCH)):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        logits = model(input_ids=rows[batch], use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[batch][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(step, f"{loss.item():.3f}", flush=True)
    model.save_pretrained(args.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (FIRST / name).exists():
            shutil.copy(FIRST / name, args.folder / name)


if __name__ == "__main__":
    main()
