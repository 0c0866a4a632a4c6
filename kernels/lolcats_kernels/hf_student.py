"""Makes a causal language model of transformers a student: its attention, its cache, and what it refuses.

Works over any model whose attentions go through transformers' attention interface, by hooks on two kinds of
modules: each attention (which is handed its layer of the cache) and the base model (which makes the cache).

Letters: see ../README.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .hf_adapters import adapt, adapter, number_by_name
from .hf_attention import NAME, HybridAttention, lolcats_attention, register
from .hf_cache import CACHE_NAME, LolcatsCache, LolcatsCacheLayer, SoftmaxCacheLayer, given_cache
from .hf_graph import GraphedStep
from .spec import HybridConfig, layer_config

logger = logging.get_logger(__name__)

# What attentions to an encoder are called in a decoder's layer; a causal language model has no encoder to look at.
TO_ENCODER = ("encoder_attn", "crossattention", "cross_attn", "encoder_attention")
# RoPE whose frequencies depend on the length of the sequence, past the length that it was trained for.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class LolcatsMixin:
    """The behaviour of a student. In the bases of a class it comes before a causal-LM class."""

    def new_cache(self, max_length: int | None = None) -> LolcatsCache:
        """An empty cache, for `generate(cache=…)` (`past_key_values` before transformers 5.24) or for your own loop.

        max_length: for a compiled loop: the cache is for at most so many tokens, and what it holds keeps its address. A
            model that cannot have such a cache gets the other.
        """
        return _new_cache(cast(PreTrainedModel, self), max_length)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Accepts "lolcats" only: with softmax attention the weights of a student would be another model."""
        if attn_implementation != NAME:
            raise ValueError(f"A student computes {NAME!r} attention. It cannot be set to {attn_implementation!r}.")

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} is for growing caches. Leave it out, because this model has its own "
                "cache."
            )
        if getattr(generation_config, "is_assistant", False) or "assisted" in str(
            getattr(generation_mode, "value", "")
        ):
            raise ValueError(
                "Assisted generation and prompt lookup roll the cache back, which a linear-attention state cannot do. "
                "Generate without assistant_model and prompt_lookup_num_tokens."
            )
        if model_kwargs.get(CACHE_NAME) is not None:
            _check_cache(model_kwargs[CACHE_NAME])
        elif generation_config.use_cache is not False:
            length = None
            if kind == "static":  # as long as the last, so that what was compiled for it serves again
                length = self._longest = max(max_cache_length, getattr(self, "_longest", 0))
            model_kwargs[CACHE_NAME] = self.new_cache(length)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` decodes with where the cache keeps its addresses: a CUDA graph, which takes less time to make
        than a compilation, unless a `compile_config` asks for one."""
        model = cast(Any, self)
        if compile_config is not None or model.device.type != "cuda":
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        one_device = len({x.device for x in model.parameters()}) == 1
        return GraphedStep(model.__call__) if one_device else model.__call__

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HybridAttention):
            fresh = HybridAttention(module.config, module.num_heads, module.head_dim, module.layer_idx).state_dict()
            for name, parameter in module.named_parameters():
                initialization.copy_(parameter, fresh[name])  # not those that were loaded
        else:
            super()._init_weights(module)  # type: ignore[misc]


class MergedStudent(LolcatsMixin):
    """A student that is loaded as such, from a folder whose configuration has a `lolcats` entry:
    {"hybrid": what `layer_config` takes, "layers": indices, "num_heads": query heads with maps, "head_dim"}. The last
    two are numbers, or lists of as many as there are layers, where these differ."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        spec = getattr(config, "lolcats", None)
        if not spec:
            raise ValueError("config.json has no `lolcats` entry, so this is not a merged student.")
        sizes = [x if isinstance(x, list) else [x] * len(spec["layers"]) for x in (spec["num_heads"], spec["head_dim"])]
        heads = dict(zip(spec["layers"], zip(*sizes, strict=True), strict=True))
        size = getattr(config, "sparse_cache_size", 0)
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"sparse_cache_size is {size!r}. It must be a whole number, and 0 means no sparse cache.")
        configs = {layer: layer_config(spec["hybrid"], layer) for layer in heads}
        for hybrid in attach(cast(PreTrainedModel, self), configs, heads):
            hybrid.sparse_cache_size = size

    def is_custom_code(self) -> bool:
        """The teacher's modules are transformers' own: what they compute when a model is made, as buffers that no file
        holds, is computed as theirs."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that the folder lacks are an error: fresh ones would give another model."""
        load: Any = super().from_pretrained  # type: ignore[misc]
        model, info = load(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(f"The folder lacks weights of this model: {', '.join(sorted(info['missing_keys'])[:4])}.")
        return (model, info) if output_loading_info else model


def share_layout(model_type: str, teacher: type[PreTrainedModel], teacher_type: str) -> None:
    """Read and write the weights of `model_type` as the teacher's.

    transformers looks up by class or model type how names and layouts on disk (of GPT-NeoX, of mixtures of experts)
    become the modules'.
    """
    conversion = get_checkpoint_conversion_mapping(teacher.__name__) or get_checkpoint_conversion_mapping(teacher_type)
    if conversion:
        register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a decoder (wrapped by PEFT or not) that go through transformers' attention
    interface, ordered by their `layer_idx`. Attention to an encoder, and layers of other kinds, are left out.

    Raises ValueError if there are none, or two of the same index.
    """
    found: dict[int, nn.Module] = {}
    shared = ""  # an attention that knows of layers, but not its own
    for name, module in model.named_modules():
        parts = name.split(".")
        number_by_name(name, module)
        index = getattr(module, "layer_idx", None)
        if (
            (isinstance(index, int) or hasattr(module, "layer_idx"))
            and not {"hybrid", *TO_ENCODER}.intersection(parts)
            and ("attention" in type(module).__name__.lower() or type(module).__name__.endswith("MLA"))
            and (adapter(module) is not None or _uses_interface(cast(Any, type(module))))
        ):
            if not isinstance(index, int) or index < 0:
                shared = shared or name
                continue
            if index in found:
                raise ValueError(
                    f"{name} and another attention both have the layer number {index}, so this is not a plain decoder."
                )
            found[index] = module
    if not found and shared:
        raise ValueError(f"{type(model).__name__} has an attention, {shared}, that is shared by several layers.")
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer whose attention uses transformers' attention interface.")
    return [found[index] for index in sorted(found)]


@cache
def _uses_interface(kind: type) -> bool:
    """Whether the code of an attention's class asks transformers for its attention function, as far as can be read."""
    own = [x for x in kind.__mro__ if issubclass(x, nn.Module) and not x.__module__.startswith("torch.")]
    try:
        return any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(x) for x in own)
    except (OSError, TypeError):
        return True


def layer_index(module: nn.Module) -> int:
    """The index of an attention module's layer."""
    return cast(int, module.layer_idx)


def attach(
    model: PreTrainedModel, configs: Mapping[int, HybridConfig], heads: Mapping[int, tuple[int, int]]
) -> list[HybridAttention]:
    """Give layers of a model untrained maps and hybrid attention, in place; -> the new modules, in order.

    configs: by layer its hybrid attention.
    heads: by layer the number of query heads that get maps, and the size of their queries.
    The other layers keep their softmax attention, and a cache that grows or slides as it did.
    """
    modules = attention_modules(model)
    wanted = set(heads)
    unknown = wanted - {layer_index(module) for module in modules}
    if unknown or not wanted:
        raise ValueError(f"The maps are for layers {sorted(wanted)}, and the model has {len(modules)} attentions.")
    hybrids = []
    for module in modules:
        if layer_index(module) not in wanted:
            module.keeps_softmax = True  # type: ignore[assignment]
            _lend_cache(module)
            continue
        layer = layer_index(module)
        hybrid = HybridAttention(configs[layer], *heads[layer], layer)
        if next(hybrid.parameters()).device.type != "meta":
            hybrid = hybrid.to(execution_device(module))
        module.hybrid = hybrid.to(torch.float32).requires_grad_(False)
        _lend_cache(module)
        hybrids.append(module.hybrid)
    for holder in _holders(model, modules):
        parameters = list(inspect.signature(type(holder).forward).parameters)[1:]
        holder.register_forward_pre_hook(partial(_prepare_inputs, parameters), with_kwargs=True)
    fix_rotation(model)
    adapt(model, lolcats_attention)
    # Maps stay in fp32 for every dtype that the model is loaded in, because features are computed in fp32.
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | {"hybrid"}
    register()
    model.config._attn_implementation = NAME
    model.config.get_text_config(decoder=True)._attn_implementation = NAME
    return hybrids


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them from the CPU or the disk."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def fix_rotation(model: nn.Module) -> None:
    """Keeps the RoPE frequencies of the teacher's own length ("dynamic", "longrope") for sequences of any length.

    These types change all frequencies when a sequence becomes longer, but a state has summed keys that were rotated by
    the old frequencies.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) in LENGTH_DEPENDENT_ROPE:
            rotation = cast(Any, module)
            rotation.rope_type = "default"  # so that transformers leaves the frequencies alone
            rotation.inv_freq = rotation.original_inv_freq.clone()


def _holders(model: PreTrainedModel, attentions: list[nn.Module]) -> list[PreTrainedModel]:
    """The models inside, one in the other, that hold all attentions: they make caches and positions. Mostly there is
    one; a text model inside a model for images has two."""
    wanted = set(map(id, attentions))
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(map(id, m.modules()))]
    return [m for m in holders if m is not model] or holders


def _check_cache(cache: object) -> LolcatsCache:
    if not isinstance(cache, LolcatsCache):
        raise ValueError(
            f"This model keeps a recurrent state and cannot use a {type(cache).__name__}. Pass no cache (the "
            "model makes its own), what it returned, or model.new_cache()."
        )
    return cache


def _lend_cache(module: nn.Module) -> None:
    """Give an attention its layer of the cache during each call."""
    module.register_forward_pre_hook(_hand_cache_over, with_kwargs=True)
    module.register_forward_hook(_take_cache_back, always_call=True)


def _hand_cache_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    past = given_cache((*kwargs.values(), *args))
    if past is not None:
        layer = _check_cache(past).layers[layer_index(module)]
        kept = hasattr(module, "keeps_softmax")
        if isinstance(layer, LolcatsCacheLayer) and isinstance(layer, SoftmaxCacheLayer) == kept:
            _user(module).cache_layer = layer
        elif not kept:
            raise ValueError(
                f"The cache has no state for layer {layer_index(module)}, so it belongs to another student."
            )


def _take_cache_back(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    _user(module).cache_layer = None


def _user(module: nn.Module) -> Any:
    """What of an attention uses its layer of the cache: a kept one uses it if its addresses are fixed."""
    return getattr(module, "hybrid", module)


def _prepare_inputs(
    parameters: list[str], base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the base model runs: make the cache that it would make itself, as ours, and positions from padding.

    parameters: the names of its forward's, bound when the student is made, as torch.compile cannot look them up.
    """
    kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True cannot be served: a student sums features of keys and never has attention weights."
        )
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(base.config, "use_cache", False) if use_cache is None else use_cache
    past, mask, positions = (kwargs.get(name) for name in (CACHE_NAME, "attention_mask", "position_ids"))
    past = given_cache(kwargs.values()) if past is None else past
    if past is not None:
        _check_cache(past)
    elif use_cache and not _is_checkpointing(base):
        kwargs[CACHE_NAME] = _new_cache(base)
    counts = "position_ids" in parameters and not _finds_positions(base)
    if positions is None and counts and isinstance(mask, Tensor) and mask.ndim == 2:
        kwargs["position_ids"] = _positions(mask, _num_tokens(kwargs))
    elif positions is not None and mask is None and past is None and not torch.compiler.is_compiling():
        _refuse_packed(positions)
    return (), kwargs


def _finds_positions(base: nn.Module) -> bool:
    """Whether the model finds positions itself: from the tokens that are not padding, as RoBERTa does, from 2 on, or
    from those and the images between them, as Qwen-VL does."""
    embeddings = getattr(base, "embeddings", None)
    return hasattr(embeddings, "create_position_ids_from_input_ids") or hasattr(base, "get_rope_index")


def _refuse_packed(positions: Tensor) -> None:
    """Positions that do not count up by one are transformers' sign of several sequences in a row."""
    if positions.ndim == 2 and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids that restart mean packed sequences, which a recurrent state would mix. Give one sequence per "
            "row, with an attention_mask where rows are padded."
        )


def _new_cache(base: nn.Module, max_length: int | None = None) -> LolcatsCache:
    """The cache that a base model, or the model around it, would make itself, as ours. With max_length its tensors keep
    their addresses, unless the model finds positions in a mask, or keeps a sparse cache or one of its own."""
    hybrids = [module for module in base.modules() if isinstance(module, HybridAttention)]
    if any(module.sparse_cache_size for module in hybrids) or any(map(_own_cache, base.modules())):
        max_length = None
    if "position_ids" not in inspect.signature(type(base).forward).parameters or any(
        map(_finds_positions, base.modules())
    ):
        max_length = None
    kept = [layer_index(module) for module in base.modules() if hasattr(module, "keeps_softmax")]
    converted = {module.layer_idx: bool(module.config.kept_heads) for module in hybrids}
    partly = [layer for layer, has_kept in converted.items() if has_kept]
    cache = LolcatsCache(cast(PreTrainedModel, base).config, converted, kept, max_length, partly)
    own = next((x for x in map(_own_cache, base.modules()) if x is not None), None)
    if own is not None:
        cache.__class__ = type(f"Lolcats{own.__name__}", (LolcatsCache, own), {})
        kinds = cast(Any, base.config).layer_types
        cache.linear_cache = [None if kind == "linear_attention" else [] for kind in kinds]  # type: ignore[attr-defined]
    return cache


def _own_cache(module: nn.Module) -> type[Cache] | None:
    """The class of caches of MiniMax, for one of its attentions: its recurrences keep their states in no other."""
    kind = type(module)
    return sys.modules[kind.__module__].MiniMaxCache if kind.__name__ == "MiniMaxAttention" else None


def _is_checkpointing(base: nn.Module) -> bool:
    """Whether layers will be run again in the backward pass: transformers then uses no cache."""
    return base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _num_tokens(kwargs: dict[str, Any]) -> int:
    inputs = kwargs.get("input_ids")
    return int((kwargs["inputs_embeds"] if inputs is None else inputs).shape[1])


def _positions(mask: Tensor, tokens: int) -> Tensor:
    """Positions [B, T] of the last `tokens` columns of a padding mask (0: padding), from each row's first real token.

    Feature maps act after RoPE, so unlike softmax attention they see absolute positions: left padding must not shift
    them.
    """
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
