"""What of a teacher keeps softmax attention: whole layers, and key heads of other layers with their query heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lolcats_cli.errors import UsageError

Layers = Sequence[Mapping[str, Any]]  # a teacher's, as in a manifest


def check_there(option: str, given: Collection[int | str | tuple[int, int]], teacher: Layers) -> None:
    """Raises UsageError for a layer, or a layer and key head, that the teacher does not have."""
    for one in given:
        if isinstance(one, str):
            continue
        layer, head = one if isinstance(one, tuple) else (one, None)
        named = f"{option} {_written(given)} names"
        if not 0 <= layer < len(teacher):
            raise UsageError(
                f"{named} layer {layer}, and the teacher has {counted(len(teacher), 'layer')}, counted from 0."
            )
        if head is not None and head >= (heads := teacher[layer]["num_key_value_heads"]):
            raise UsageError(
                f"{named} key head {head} of layer {layer}, which has {counted(heads, 'key head')}, counted from 0."
            )


def _written(given: Iterable[int | str | tuple[int, int]]) -> str:
    """As the command line takes it: "0-3,7,2.0,sliding"."""
    layers = sorted(one for one in given if isinstance(one, int))
    runs = [list(run) for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    heads = [f"{one[0]}.{one[1]}" for one in given if isinstance(one, tuple)]
    return ",".join([*spans, *heads, *(one for one in given if isinstance(one, str))])


def counted(number: int, what: str) -> str:
    """ "1 layer" and "2 layers"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Kept(NamedTuple):
    """Layers, and pairs of a layer and a key head in other layers."""

    layers: frozenset[int]
    heads: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, teacher: Layers, layers: Collection[int], heads: Collection[tuple[int, int]]) -> Kept:
        """A layer whose key heads are all among `heads` is a kept layer.

        Raises UsageError if no layer is left to be converted.
        """
        count = Counter(layer for layer, _ in set(heads))
        whole = {layer for layer, kept in count.items() if kept == teacher[layer]["num_key_value_heads"]}
        kept = cls(frozenset(whole.union(layers)), frozenset(one for one in heads if one[0] not in whole.union(layers)))
        kept.check_rest(teacher)
        return kept

    @classmethod
    def named(cls, teacher: Layers, given: Collection[int | str | tuple[int, int]]) -> Kept:
        """What `given` names: layers, pairs of a layer and a key head, and "sliding". Layers without softmax attention
        are kept too.

        Raises UsageError for a layer or head that does not exist, or if no layer is left to be converted.
        """
        check_there("--keep-softmax", given, teacher)
        layers = {layer for layer in given if isinstance(layer, int)}
        heads = {one for one in given if isinstance(one, tuple)}
        if "sliding" in given:
            layers |= {i for i, layer in enumerate(teacher) if layer.get("sliding_window") is not None}
        return cls.of(teacher, layers.union(i for i, layer in enumerate(teacher) if not layer["num_heads"]), heads)

    def check_rest(self, teacher: Layers, layers: int = 0, heads: int = 0) -> None:
        """Raises UsageError if no layer is left to be converted when so many more layers and heads are kept."""
        taken = Counter(layer for layer, _ in self.heads)
        counts = (x["num_key_value_heads"] - taken[i] for i, x in enumerate(teacher) if i not in self.layers)
        if sum(sorted(counts)[layers:]) <= heads:
            raise UsageError("--keep-softmax leaves no layer to convert. Keep fewer layers or heads.")

    def words(self) -> Iterator[str]:
        """Lines that say what is kept."""
        if self.layers:
            yield f"layers that stay softmax: {', '.join(map(str, sorted(self.layers)))}"
        if self.heads:
            heads = ", ".join(f"{layer}.{head}" for layer, head in sorted(self.heads))
            yield f"key heads that stay softmax, as layer.head: {heads}"
