"""Decoding steps of a student on a GPU as one CUDA graph: `generate(cache_implementation="static")`.

A step of eager PyTorch takes as long as its launches, several times what the GPU needs for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache
from transformers.utils import logging

logger = logging.get_logger(__name__)


class GraphedStep:
    """Calls of a model that differ in the values of tensors only, recorded once and replayed.

    The first call of one token runs as it is, the second is recorded. A call of more tokens, with other shapes, other
    values that are no tensors, or another cache runs as it is. The cache must keep its addresses, and the model lie on
    one GPU.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._calls = 0
        self._given: list[Any] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, **arguments: Any) -> Any:
        ids = arguments.get("input_ids")
        if ids is None or ids.shape[1] != 1:
            return self._model(**arguments)
        self._calls += 1
        if self._calls == 2:
            self._record(arguments)
        given, _ = pytree.tree_flatten(arguments)
        if self._replay is None or not _alike(given, self._given):
            return self._model(**arguments)
        for place, x in zip(self._given, given, strict=True):
            if isinstance(place, Tensor):
                place.copy_(x)
        self._replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._out)  # the next replay writes over them

    def _record(self, arguments: dict[str, Any]) -> None:
        arguments = pytree.tree_map_only(Tensor, Tensor.clone, arguments)
        self._given, _ = pytree.tree_flatten(arguments)
        try:
            self._replay, self._out = record(lambda: self._model(**arguments))
        except RuntimeError as error:
            logger.warning_once(f"Decoding steps are not replayed as a CUDA graph: {str(error).splitlines()[0]}")


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(what runs it again, its results, which that fills)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def _alike(given: list[Any], recorded: list[Any]) -> bool:
    """Whether values differ from those recorded in what tensors hold only."""
    return len(given) == len(recorded) and all(map(_same, given, recorded))


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    return x is y if isinstance(x, Cache) else type(x) is type(y) and x == y
