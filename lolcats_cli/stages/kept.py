"""What of a teacher keeps softmax attention: whole layers, and key heads of other layers with their query heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lolcats_cli.errors import UsageError

if TYPE_CHECKING:
    from lolcats_cli.teacher.record import LayerInfo


def check_there(option: str, given: Collection[int | str | tuple[int, int]], key_heads: Sequence[int]) -> None:
    """Raises UsageError for a layer, or a layer and key head, that is not there.

    key_heads: their number in every layer of the teacher.
    """
    for one in given:
        layer, head = one if isinstance(one, tuple) else (one, None)
        written = layer if head is None else f"{layer}.{head}"
        if isinstance(layer, int) and not 0 <= layer < len(key_heads):
            raise UsageError(f"{option} {written}: The layers are 0 to {len(key_heads) - 1}.")
        if isinstance(layer, int) and head is not None and head >= key_heads[layer]:
            raise UsageError(f"{option} {written}: Layer {layer} has {key_heads[layer]} key heads, counted from 0.")


class Kept(NamedTuple):
    """Layers, and pairs of a layer and a key head in other layers."""

    layers: frozenset[int]
    heads: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, infos: list[LayerInfo], layers: Collection[int], heads: Collection[tuple[int, int]]) -> Kept:
        """A layer whose key heads are all among `heads` is a kept layer.

        Raises UsageError if no layer is left to be converted.
        """
        count = Counter(layer for layer, _ in set(heads))
        whole = {layer for layer, kept in count.items() if kept == infos[layer].num_key_value_heads}
        kept = cls(frozenset(whole.union(layers)), frozenset(one for one in heads if one[0] not in whole.union(layers)))
        kept.check_rest(infos)
        return kept

    @classmethod
    def named(cls, infos: list[LayerInfo], given: Collection[int | str | tuple[int, int]]) -> Kept:
        """What `given` names: layers, pairs of a layer and a key head, and "sliding". Layers without softmax attention
        are kept too.

        Raises UsageError for a layer or head that does not exist, or if no layer is left to be converted.
        """
        check_there("--keep-softmax", given, [info.num_key_value_heads for info in infos])
        layers = {layer for layer in given if isinstance(layer, int)}
        heads = {one for one in given if isinstance(one, tuple)}
        if "sliding" in given:
            layers |= {layer for layer, info in enumerate(infos) if info.spec.sliding_window is not None}
        return cls.of(infos, layers.union(i for i, info in enumerate(infos) if not info.has_attention), heads)

    def check_rest(self, infos: list[LayerInfo], layers: int = 0, heads: int = 0) -> None:
        """Raises UsageError if no layer is left to be converted when so many more layers and heads are kept."""
        taken = Counter(layer for layer, _ in self.heads)
        counts = (info.num_key_value_heads - taken[i] for i, info in enumerate(infos) if i not in self.layers)
        if sum(sorted(counts)[layers:]) <= heads:
            raise UsageError("--keep-softmax leaves no layer to convert. Keep fewer layers or heads.")

    def words(self) -> Iterator[str]:
        """Sentences that say what is kept."""
        if self.layers:
            yield f"layers {', '.join(map(str, sorted(self.layers)))} stay softmax"
        if self.heads:
            heads = ", ".join(f"{layer}.{head}" for layer, head in sorted(self.heads))
            yield f"key heads {heads} (layer.head) stay softmax"
