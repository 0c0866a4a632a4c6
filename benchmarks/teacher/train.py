"""Trains the embedded teacher: a small Llama with grouped-query attention that recalls facts over hundreds of tokens.

    python benchmarks/teacher/train.py --texts DIR --scratch DIR [--out lolcats_cli/assets]

Steps, in order: a byte-level BPE tokenizer, unless the folder has one; the model. (``text.py`` writes the demo's text.)
The number of steps is fixed and every draw comes from the seed. The state goes to ``--scratch`` every 100 steps, and
the same command continues from it.

What makes recall appear so soon is the start: two layers begin as a rough induction circuit (``start_with_induction``).
``--layers 4 --from-nothing --steps 700`` makes the third teacher of docs/quality.md, which has no such start.
The rows are prose with facts woven in (``corpus.weave``), prose alone, and spans of random tokens that come again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from corpus import HELD_OUT, SHARES, Prose, copying_row, read_texts, weave  # noqa: E402

from lolcats_cli.evaluation.recall import ANSWERS, NAMES, FactTokens, recall_accuracy, recall_rows, statement  # noqa: E402

VOCABULARY = 3072
CONTEXT = 1024
EOS, PAD = "<|endoftext|>", "<|pad|>"
BATCH_TOKENS = 8192
WORKERS = 2  # each batch is cut in so many parts, one thread each: the result does not depend on the cores there are
PLAIN = 0.15  # of the other rows, the share without facts
GAPS = (8, 16, 32, 64, 128, 256, 512)


def train_tokenizer(texts: dict[str, tuple[str, str]], folder: Path, seed: int) -> None:
    """Trains and saves the tokenizer. The names and answers of the facts are made frequent enough to be tokens."""
    rng = random.Random(seed)
    facts = [statement(rng.choice(NAMES), answer) for answer in ANSWERS for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([train for train, _ in texts.values()] + facts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def new_model(seed: int, eos: int, pad: int, layers: int = 6, induction: bool = True) -> LlamaForCausalLM:
    """The model before training. With `induction` two layers begin as a rough induction circuit."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        # At 10000 a head of 32 has too few dimensions that still point the same way after 900 tokens.
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(p)
        elif "embed" in name:
            torch.nn.init.normal_(p, std=0.1)
        elif p.dim() == 2:
            torch.nn.init.normal_(p, std=0.04)
    torch.nn.init.constant_(model.model.norm.weight, 0.2)
    if induction:
        start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Sets two layers' attentions to a rough induction circuit, which training then refines.

    From a random start, looking back by content was not learned in 3 M tokens (at a learning rate of 3e-3, at which
    this start is unlearned too; 1e-3 from a random start was not tried). Layer 0 writes the previous
    token's embedding into 64 dimensions the embedding leaves empty; layer 2 looks for positions whose previous token is
    the current one, with the slowly rotating half of each head, and adds the embedding found there to the stream.
    """
    config = model.config
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head, shared = hidden // heads, heads // groups
    scratch, constant = 64, hidden - 65  # empty dimensions (the last), and one that is the same for every token
    embedding = model.model.embed_tokens.weight
    embedding[:, hidden - scratch :] = 0
    embedding[:, constant] = 0.3
    directions = torch.linalg.qr(torch.randn(constant, constant))[0]  # orthonormal

    first = model.model.layers[0].self_attn
    frequencies = torch.tensor([config.rope_parameters["rope_theta"] ** (-2 * i / head) for i in range(5)])
    for group in range(2):
        keys = slice(group * head, (group + 1) * head)
        first.k_proj.weight[keys] = 0
        first.k_proj.weight[group * head : group * head + 5, constant] = 3 * frequencies.cos()
        first.k_proj.weight[group * head + head // 2 : group * head + head // 2 + 5, constant] = 3 * frequencies.sin()
        first.v_proj.weight[keys] = 0
        first.v_proj.weight[keys, :constant] = directions[keys]
        for query in range(group * shared, (group + 1) * shared):
            first.q_proj.weight[query * head : (query + 1) * head] = 0
            first.q_proj.weight[query * head : query * head + 5, constant] = 3
            for i in range(head):
                first.o_proj.weight[hidden - scratch + group * head + i, query * head + i] = 0.1 / shared

    match = model.model.layers[2].self_attn
    slow = [i for i in range(head) if i % (head // 2) >= head // 4]
    for group in range(groups):
        part = range(group * len(slow), (group + 1) * len(slow))
        match.k_proj.weight[group * head : (group + 1) * head] = 0
        for i, source in zip(slow, part, strict=True):
            match.k_proj.weight[group * head + i, hidden - scratch + source] = 2.4
        keys = slice(group * head, (group + 1) * head)
        match.v_proj.weight[keys] = 0
        match.v_proj.weight[keys, :constant] = directions[keys]
        for query in range(group * shared, (group + 1) * shared):
            match.q_proj.weight[query * head : (query + 1) * head] = 0
            for i, source in zip(slow, part, strict=True):
                match.q_proj.weight[query * head + i, :constant] = 2.4 * directions[source]
            match.o_proj.weight[:constant, query * head : (query + 1) * head] = 0.3 / shared * directions[keys].T


class Mix:
    """Draws training batches, each from a generator of its own step."""

    def __init__(self, prose: dict[str, Prose], tokenizer: Any, seed: int) -> None:
        self.prose, self.tokenizer, self.seed = prose, tokenizer, seed
        self.tokens = FactTokens(tokenizer)

    def batch(self, step: int, length: int, copying: float) -> dict[str, torch.Tensor]:
        """One batch of rows of ``length``: ids, loss weights, and the kind of each token.

        Kinds: 1 a copy of random tokens, 2 the answer of a told fact, 0 the rest.
        """
        rng = random.Random(f"{self.seed} {step}")
        rows = []
        for _ in range(BATCH_TOKENS // length):
            name = rng.choices(list(SHARES), list(SHARES.values()))[0]
            prose = self.prose[name]
            if rng.random() < copying:
                gap = min(rng.choice(GAPS), length // 2)
                ids, weights, copies = copying_row(prose, length, gap, len(self.tokenizer), rng)
                kind = np.where(copies, 1, 0)
            else:
                start = rng.randrange(len(prose.ids) - 2 * length)
                if rng.random() < PLAIN:
                    chunk, told = prose.ids[start : start + length].tolist(), [False] * length
                else:
                    chunk, told, _ = weave(
                        prose,
                        start,
                        length,
                        self.tokens,
                        rng,
                        facts=rng.randint(1, 4),
                        gap=min(rng.choice([16, 80, 80, 80, 160, 320, 640, 900]), length * 3 // 4),
                        spacing=(8, 40),
                        evaluation=False,
                    )
                ids = np.array(chunk[:length], dtype=np.int64)
                weights = np.ones(length, dtype=np.float32)
                kind = np.where(np.array(told[:length]), 2, 0)
                # Sometimes the row begins with a document, as in packed text.
                if rng.random() < 0.2:
                    ids[0] = self.tokenizer.eos_token_id
            rows.append((ids, weights, kind))
        ids, weights, kind = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return {"ids": ids, "weights": weights, "kind": kind}


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 60 steps, flat to half of the run, then linearly to 0."""
    return min((step + 1) / 60, 1.0, (steps - step) / (steps * 0.5))


def copying_share(progress: float) -> float:
    """The share of rows with spans of random tokens that come again; more of them early, so that the start is kept."""
    return 0.5 if progress < 0.12 else 0.25 if progress < 0.3 else 0.1


def row_length(progress: float) -> int:
    return 256 if progress < 0.2 else 512 if progress < 0.4 else CONTEXT


class Masters:
    """fp32 copies of the parameters, for the optimizers: Muon for matrices, AdamW for the embedding and the norms.

    The bf16 replicas each see a part of every batch; their gradients are added.
    """

    def __init__(self, model: torch.nn.Module, replicas: list[LlamaForCausalLM], lr: float) -> None:
        self.replicas = [list(replica.parameters()) for replica in replicas]
        self.fp32 = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
        names = [n for n, _ in model.named_parameters()]
        matrix = [p for n, p in zip(names, self.fp32, strict=True) if p.dim() == 2 and "embed" not in n]
        rest = [p for n, p in zip(names, self.fp32, strict=True) if not (p.dim() == 2 and "embed" not in n)]
        self.optimizers = [
            torch.optim.Muon(matrix, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for parameters in self.replicas:
            for p, master in zip(parameters, self.fp32, strict=True):
                p.copy_(master)

    def step(self, factor: float) -> None:
        for master, *parts in zip(self.fp32, *self.replicas, strict=True):
            master.grad = sum(p.grad.float() for p in parts)  # type: ignore[union-attr, misc, assignment]
            for p in parts:
                p.grad = None
        torch.nn.utils.clip_grad_norm_(self.fp32, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor
            optimizer.step()
        self.publish()

    def state(self) -> dict[str, Any]:
        return {"fp32": [p.detach() for p in self.fp32], "optimizers": [o.state_dict() for o in self.optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for p, stored in zip(self.fp32, state["fp32"], strict=True):
                p.copy_(stored)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.publish()


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: Any, held: dict[str, Prose]) -> dict[str, float]:
    """A short look at held-out prose and at recall; the card has the full figures."""
    model.eval()
    result = {}
    rows = torch.from_numpy(np.stack([held[n].ids[i : i + 512] for n in held if n != "gsm8k" for i in (0, 512)]))
    logits = model(input_ids=rows).logits.float()
    result["prose_nats"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    filler = torch.from_numpy(held["moby-dick"].ids)
    for distance in (64, 512, 900):
        result[f"recall_{distance}"] = recall_accuracy(
            model, recall_rows(tokenizer, filler, distance=distance, count=32, seed=1)
        )
    model.train()
    return result


def backward(part: tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradients of one part of a batch; returns each token's loss and whether it was predicted."""
    replica, ids, weight = part
    logits = replica(input_ids=ids, use_cache=False).logits[:, :-1]
    target = ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(target)
    (losses * weight).sum().backward()
    return losses.detach(), logits.detach().argmax(-1) == target


def train(args: argparse.Namespace, tokenizer: Any, texts: dict[str, tuple[str, str]]) -> None:
    prose = {name: Prose.encode(tokenizer, part) for name, (part, _) in texts.items()}
    held = {name: Prose.encode(tokenizer, part) for name, (_, part) in texts.items()}
    print({name: (len(prose[name].ids), len(held[name].ids)) for name in prose}, flush=True)
    mix = Mix(prose, tokenizer, args.seed)
    model = new_model(args.seed, tokenizer.eos_token_id, tokenizer.pad_token_id, args.layers, not args.from_nothing)
    replicas = [copy.deepcopy(model).to(torch.bfloat16) for _ in range(WORKERS)]
    masters = Masters(model, replicas, args.lr)
    model = replicas[0]
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    first, seconds = 0, 0.0
    state_file = args.scratch / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        masters.load(state["masters"])
        first, seconds = state["step"], state["seconds"]
        print(f"continuing at step {first}", flush=True)
    log = (args.scratch / "log.jsonl").open("a")
    clock = time.perf_counter()
    for step in range(first, args.steps):
        length = row_length(step / args.steps)
        batch = mix.batch(step, length, copying_share(step / args.steps))
        weight, kind = batch["weights"][:, 1:], batch["kind"][:, 1:]
        boosted = weight * torch.where(kind == 2, args.answer_weight, 1.0) / weight.sum()
        parts = zip(replicas, batch["ids"].chunk(WORKERS), boosted.chunk(WORKERS), strict=True)
        losses, hit = (torch.cat(part) for part in zip(*pool.map(backward, parts), strict=True))
        masters.step(learning_rate(step, args.steps))
        if step % 20 == 0 or step + 1 == args.steps:
            plain = (kind == 0) & (weight > 0)
            event = {
                "step": step,
                "tokens": (step + 1) * BATCH_TOKENS,
                "seconds": round(seconds + time.perf_counter() - clock),
                "length": length,
                "loss": round(losses[plain].mean().item(), 4),
                "copied": round(hit[kind == 1].float().mean().item(), 3) if (kind == 1).any() else None,
                "told": round(hit[kind == 2].float().mean().item(), 3) if (kind == 2).any() else None,
            }
            if step % 200 == 0 and step:
                event |= {k: round(v, 4) for k, v in measure(model, tokenizer, held).items()}
            print(json.dumps(event), file=log, flush=True)
            print(json.dumps(event), flush=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            spent = seconds + time.perf_counter() - clock
            state = {"masters": masters.state(), "step": step + 1, "seconds": spent}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            save(model, args, tokens=(step + 1) * BATCH_TOKENS, seconds=spent)


def save(model: LlamaForCausalLM, args: argparse.Namespace, *, tokens: int, seconds: float) -> None:
    """Writes the model folder and the record of its training."""
    folder = args.out / "teacher"
    model.save_pretrained(folder)
    record = {
        "tokens": tokens,
        "planned_tokens": args.steps * BATCH_TOKENS,
        "seed": args.seed,
        "learning_rate": args.lr,
        "answer_weight": args.answer_weight,
        "steps": args.steps,
        "batch_tokens": BATCH_TOKENS,
        "seconds": round(seconds),
        "torch": torch.__version__.split("+")[0],
        "shares": SHARES,
        "held_out": HELD_OUT,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder with the three novels, the plays and gsm8k")
    parser.add_argument("--out", type=Path, default=ROOT / "lolcats_cli" / "assets")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the state and the log of this run")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--answer-weight", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--from-nothing", action="store_true", help="without the induction circuit at the start")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True, exist_ok=True)
    texts = read_texts(args.texts)
    if not (args.out / "teacher" / "tokenizer.json").exists():
        train_tokenizer(texts, args.out / "teacher", args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "teacher")
    train(args, tokenizer, texts)


if __name__ == "__main__":
    main()
