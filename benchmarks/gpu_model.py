"""A whole model on a GPU, for `gpu`: layers of Llama 3 8B with random weights, the student beside the softmax model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from decode import build, filled, gate, read
from gpu_layer import EXACT, Setup, Task, as_graph, config_of
from lolcats_kernels.hf_attention import HybridAttention
from lolcats_kernels.hf_graph import GraphedStep
from transformers import PreTrainedModel, StaticCache

ROOM = 256  # tokens that a static cache has beyond its context; a figure takes fewer steps

Prepared = tuple[Callable[[], object], dict[str, Any]]


class Models:
    """Made when the first figure needs them."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device

    @cached_property
    def both(self) -> dict[str, PreTrainedModel]:
        setup = self.setup
        sizes = {
            "hidden_size": setup.hidden,
            "intermediate_size": setup.intermediate,
            "num_hidden_layers": setup.layers,
            "num_attention_heads": setup.heads,
            "num_key_value_heads": setup.key_heads,
        }
        softmax, student = build(sizes, str(self.device), setup.dtype, config_of(setup, "sliding exp"))
        with torch.no_grad():
            gate(student)
        return {"student": student, "softmax": softmax}

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        return torch.randint(0, 1024, (batch, count), device=self.device)

    def prefill(self, name: str, count: int) -> Prepared:
        model, ids = self.both[name], self.tokens(1, count)
        return partial(model, ids, logits_to_keep=1, use_cache=True), {}

    def prefill_sparse(self, count: int) -> Prepared:
        """The student's, with exact keys beside its windows."""
        prompt, labels = self.prefill("student", count)
        hybrids = [module for module in self.both["student"].modules() if isinstance(module, HybridAttention)]

        def run() -> None:
            for module in hybrids:
                module.sparse_cache_size = EXACT
            prompt()
            for module in hybrids:
                module.sparse_cache_size = 0

        return run, labels

    def weights(self) -> Prepared:
        parameters = list(self.both["student"].parameters())
        return as_graph(lambda: [x.sum() for x in parameters], self.device), {}

    def decoding(self, name: str, batch: int, context: int, static: bool) -> Prepared:
        """A step after a context."""
        model, ids = self.both[name], self.tokens(batch, 1)
        position = torch.full((1, 1), context, device=self.device)
        cache: Any
        if name == "student":
            cache = read(model, batch, context, model.new_cache(context + ROOM if static else None))
        elif static:
            cache = StaticCache(model.config, max_cache_len=context + ROOM)
            model(ids, past_key_values=cache)
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
                layer.cumulative_length.fill_(context)
        else:
            cache = filled(model, batch, context)
        call = GraphedStep(model) if static else model
        run = partial(call, input_ids=ids, past_key_values=cache, position_ids=position)
        if not static:
            return run, {}
        for _ in range(2):  # the second is recorded
            run()
        recorded = "CUDA graph" if call._replay is not None else "not a graph"
        return run, {"path": f"{name}, static cache, {recorded}"}

    def lora(self, name: str, batch: int, count: int) -> Prepared:
        """Forward, backward and optimizer; rank 8 on the attentions' projections."""
        from peft import LoraConfig, get_peft_model

        model: Any = self.both[name]
        if not hasattr(model, "peft_config"):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
            model.train()
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-4)
        ids = self.tokens(batch, count)

        def train() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train, {}


def model(setup: Setup, device: torch.device) -> Iterator[Task]:
    """Prompts, then decoding, then training, which leaves adapters in the models."""
    models = Models(setup, device)

    def task(
        what: str, path: str, batch: int, tokens: int, prepare: Callable[[], Prepared], train: bool = False
    ) -> Task:
        labels = {"kind": "sliding exp", "what": what, "path": path, "batch": batch, "tokens": tokens}
        return Task(labels, prepare, train)

    yield task("decoding step", "reading the weights", 1, 1, models.weights)
    for count in setup.prompts:
        for name in ("student", "softmax"):
            yield task("prompt", name, 1, count, partial(models.prefill, name, count))
        yield task("prompt", f"student, {EXACT} exact keys", 1, count, partial(models.prefill_sparse, count))
    for batch in setup.batches:
        for context in setup.contexts:
            for name in ("student", "softmax"):
                path = f"{name}, static cache"
                yield task("decoding step", path, batch, context, partial(models.decoding, name, batch, context, True))
    for name in ("student", "softmax"):
        context = setup.contexts[0]
        yield task("decoding step", f"{name}, eager", 1, context, partial(models.decoding, name, 1, context, False))
    for batch, count in setup.lora:
        for name in ("student", "softmax"):
            yield task("LoRA step", name, batch, count, partial(models.lora, name, batch, count), True)
