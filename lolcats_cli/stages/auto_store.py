"""Chooses the store of a capture with --store auto: the one that it began with, or the first one that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import begun_config

from lolcats_cli import ranks
from lolcats_cli.artifacts.stores import LOGIT_BYTES, Sizes, available_memory, choose
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.blocks import decoder_layers
from lolcats_cli.teacher.record import LayerInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEATURES = 64  # of a head's maps, as `transfer` trains them by default


def store_config(store: str, block_size: int | None, batch_size: int) -> dict[str, Any]:
    """A capture's configuration entries for its store. "attention" has none: it was the only store at first."""
    if store == "attention":
        return {}
    return {"store": store, "batch_size": batch_size, **({"block_size": block_size or 8} if store == "block" else {})}


def pick(
    sizes: Callable[[], Sizes],
    batch_size: int,
    settings: dict[str, Any],
    output: Path | str,
    force: bool,
    disk: float,
    memory: float,
    cpu: bool,
    progress: Progress,
) -> tuple[str, int | None]:
    """(the store, its block size) for a capture into `output`.

    Args:
        sizes: what the capture takes. It is called if a store is to be chosen.
        batch_size: rows per forward pass.
        settings: the capture's configuration without its store.
        force: whether what `output` holds is replaced.
        disk: bytes that may be written.
        memory, cpu: bytes of the device, and whether it is a CPU.

    Raises NotEnoughSpace if nothing fits.
    """
    begun = begun_config(output, force)
    if begun is not None:
        store, block_size = begun.get("store", "attention"), begun.get("block_size")
        same = settings | store_config(store, block_size, batch_size)
        if not force or begun == json.loads(json.dumps(same)):  # with --force, others are begun anew
            return store, block_size
    choice = choose(sizes(), disk, memory, cpu)
    progress.note(f"--store auto takes {choice.store}. {choice.reason}")
    return choice.store, choice.block_size


def device_memory(device: torch.device) -> float:
    """Bytes that are free on the device, for this process: the ranks of a computer share its CPU's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_memory() / ranks.size()


def sizes_of(
    model: PreTrainedModel, layers: list[LayerInfo], rows: int, seq_len: int, batch_size: int, logits: int = 0
) -> Sizes:
    """The sizes of a capture of `rows` rows, with so many `logits` behind every token, and of its transfer, from the
    loaded teacher and its probed layers."""
    modules, itemsize = decoder_layers(model), model.dtype.itemsize
    weights = tuple(sum(part.nbytes for part in module.parameters()) for module in modules)
    widest = max(max(part.shape[-2:]) for module in modules for part in module.parameters() if part.ndim > 1)
    text = model.config.get_text_config()
    head = sum(part.nbytes for part in model.parameters()) - sum(part.nbytes for part in model.base_model.parameters())
    # A batch's logits, and those of one row twice in fp32.
    predicting = head + seq_len * text.vocab_size * (batch_size * itemsize + 8)
    heads = max(info.num_heads * max(info.head_dim, info.v_head_dim) for info in layers)
    return Sizes(
        rows=rows,
        seq_len=seq_len,
        batch_size=batch_size,
        attention=tuple(info.bytes_per_token(model.dtype) for info in layers),
        hidden=text.hidden_size * itemsize,
        weights=weights,
        beside=sum(part.nbytes for part in model.base_model.parameters()) - sum(weights),
        width=(3 * widest + 4 * text.hidden_size) * itemsize,
        heads=heads,
        maps=2 * heads * FEATURES,
        logits=logits * LOGIT_BYTES,
        predicting=predicting if logits else 0,
    )
