"""A student in memory: a loaded teacher whose attentions are replaced, to be trained, evaluated or sampled from.

Shapes: H query heads, D head, F features.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from lolcats_kernels.hf_attention import HybridAttention
from lolcats_kernels.hf_student import LENGTH_DEPENDENT_ROPE, LolcatsMixin, attach, attention_modules, layer_index
from lolcats_kernels.maps import HybridMaps
from lolcats_kernels.spec import TERMS, HybridConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lolcats_cli.errors import BadInput, IdentityMismatch

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "as_teacher",
    "attention_modules",
    "check_servable",
    "check_shapes",
    "hybrid_modules",
    "linear_layers",
    "linearize",
    "projections",
    "set_terms",
    "stated_heads",
]


def linearize(
    model: PreTrainedModel,
    config: HybridConfig | Mapping[int, HybridConfig],
    maps: Mapping[int, HybridMaps | Mapping[str, Tensor]],
    keep_softmax: Collection[int] = (),
    heads: Mapping[int, tuple[int, int]] | None = None,
) -> PreTrainedModel:
    """Replaces the attentions of a loaded teacher, in place, by hybrid attention with trained maps. Returns the model.

    config: the hybrid attention of all layers, or by layer.
    maps: by layer, a `HybridMaps` or its state dict. The values are copied to the layer's device in fp32.
    keep_softmax: the layers that keep their attention, and have no maps.
    heads: by layer, the number of query heads that have maps, and the size of their queries. With None, the model's own
        are taken.
    The new parameters do not require gradients. Cached generation works; `save_pretrained` is refused.

    Raises IdentityMismatch if layers or shapes do not fit the model, BadInput if its attention cannot be replaced.
    """
    check_servable(model)
    modules = attention_modules(model)
    indices = [index for module in modules if (index := layer_index(module)) not in keep_softmax]
    if isinstance(model, LolcatsMixin):
        raise BadInput(f"{type(model).__name__} is a student already. linearize takes a teacher.")
    if sorted(maps) != indices:
        missing, extra = sorted(set(indices) - set(maps)), sorted(set(maps) - set(indices))
        parts = [f"there are none for layers {_spans(missing)}"] * bool(missing)
        parts += [f"there are some for layers {_spans(extra)}, which it does not have"] * bool(extra)
        raise IdentityMismatch(
            f"The feature maps do not fit {type(model).__name__}: {', and '.join(parts)}. "
            "Transfer the missing layers, or use the teacher that was captured."
        )
    states = {
        index: layer.state_dict() if isinstance(layer, nn.Module) else dict(layer) for index, layer in maps.items()
    }
    configs = dict.fromkeys(indices, config) if isinstance(config, HybridConfig) else config
    if heads is None:
        stated = {layer_index(module): stated_heads(model, module) for module in modules}
        keys = getattr(model.config.get_text_config(), "num_key_value_heads", None)
        heads = {i: (configs[i].mapped_heads(stated[i][0], keys or stated[i][0]), stated[i][1]) for i in indices}
    for index, state in states.items():
        check_shapes(index, state, HybridMaps(configs[index], *heads[index]).state_dict())
    for hybrid in attach(model, configs, {index: heads[index] for index in indices}):
        hybrid.load_state_dict(states[hybrid.layer_idx])
    # generate() and transformers ask the model's class, so the instance gets one with the student's behaviour in front.
    model.__class__ = _student_class(cast(Any, type(model)))
    return model


def check_servable(model: PreTrainedModel) -> None:
    """Raises BadInput, with the model and the reason, unless a student of this teacher can be built."""
    name = type(model).__name__
    try:
        attention_modules(model)
    except ValueError as error:
        if not (_says(model, "softmax(") or _says(model, "logsumexp(")):
            raise BadInput(f"{name} has no softmax attention: there is nothing to linearize.") from error
        if _says(model, "alibi"):
            raise BadInput(
                f"{name} adds a bias by distance to its scores (ALiBi), for which a student has no term."
            ) from error
        raise BadInput(f"{error} lolcats cannot convert it.") from error
    if any(getattr(module, "compressor", None) is not None for module in attention_modules(model)):
        raise BadInput(f"{name} attends to keys that are compressed from several tokens, which is not served.")
    for module in model.modules():
        by_type = getattr(module, "rope_type", None)
        if isinstance(by_type, dict) and set(by_type.values()) & set(LENGTH_DEPENDENT_ROPE):
            raise BadInput(f"{name} has RoPE that depends on the length for some layers, which is not served yet.")


def _says(model: PreTrainedModel, word: str) -> bool:
    """Whether the code of a model contains a word; true if it cannot be read."""
    try:
        return word in inspect.getsource(inspect.getmodule(type(model)) or type(model))
    except (OSError, TypeError):
        return True


def hybrid_modules(model: nn.Module) -> list[HybridAttention]:
    """The maps of a student, in memory or loaded from a merged folder, in layer order; kept layers have none.

    Raises BadInput if the model is not a student.
    """
    hybrids = [module.hybrid for module in attention_modules(model) if hasattr(module, "hybrid")]
    if not hybrids:
        raise BadInput(f"{type(model).__name__} is not a student: its attentions have no feature maps.")
    return hybrids  # type: ignore[return-value]


def set_terms(model: nn.Module, terms: str) -> None:
    """Sets the terms that a student's attention sums, for ablations: both, window or linear."""
    if terms not in TERMS:
        raise ValueError(f"terms is {terms!r}. Choose one of {', '.join(TERMS)}.")
    for hybrid in hybrid_modules(model):
        hybrid.terms = terms


@contextmanager
def as_teacher(model: PeftModel) -> Iterator[None]:
    """While open, a student in memory with an adapter computes what its teacher does: softmax attention in every layer,
    no adapter, no dropout."""
    converted = [module for module in attention_modules(model) if not getattr(module, "keeps_softmax", False)]
    training = model.training
    try:
        for module in converted:
            module.keeps_softmax = True  # type: ignore[assignment]
        model.eval()
        with model.disable_adapter():
            yield
    finally:
        for module in converted:
            module.keeps_softmax = False  # type: ignore[assignment]
        model.train(training)


def stated_heads(model: PreTrainedModel, module: nn.Module) -> tuple[int, int]:
    """(query heads, size of their queries) of one of a model's attentions, as the module or the configuration says."""
    config = model.config.get_text_config()
    counts = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads")]
    heads = next((count for count in counts if isinstance(count, int)), None) or config.num_attention_heads
    for name in ("qk_head_dim", "head_dim", "head_size"):
        if isinstance(size := getattr(module, name, None), int):
            return heads, size
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def linear_layers(model: nn.Module) -> set[str]:
    """The names of the modules that an adapter can be given to."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def projections(model: nn.Module) -> dict[str, str]:
    """The linear layers of a model's attentions, gates left out: name -> what PEFT's `target_modules` calls it.

    That is the end of the name, or, where other layers end so too, with the attention before it: GPT-2's `attn.c_proj`.
    """
    places = linear_layers(model)
    attentions = {id(module) for module in attention_modules(model)}
    inside = {
        f"{name}.{part}": (name.rpartition(".")[2], part)
        for name, module in model.named_modules()
        if id(module) in attentions
        for part, _ in module.named_modules()
        if f"{name}.{part}" in places and "gate" not in part
    }
    elsewhere = [f".{name}" for name in sorted(places - set(inside))]
    short = {part: not any(name.endswith(f".{part}") for name in elsewhere) for _, part in inside.values()}
    return {name: part if short[part] else f"{parent}.{part}" for name, (parent, part) in inside.items()}


class _InMemory(LolcatsMixin):
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the folder would carry the teacher's model type and load as a plain softmax model."""
        raise BadInput("A student in memory is not saved as a model folder; write one with `lolcats merge`.")


@cache
def _student_class(base: type) -> type:
    return type(f"Lolcats{base.__name__}", (_InMemory, base), {"__module__": base.__module__})


def check_shapes(layer: int, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found != wanted:
        raise IdentityMismatch(f"The feature maps of layer {layer} are {found}; this model and options need {wanted}.")


def _spans(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (" …" if len(indices) > 8 else "")
