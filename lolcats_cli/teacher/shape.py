"""Reads a teacher's sizes from its config.json alone, without its weights, torch or transformers.

Matrices are counted. Norms and biases are too small to count. A model that is not understood is refused by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.hub import fetch

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Model types whose layers have the matrices q, k, v and o, and an MLP with three matrices (gated) or two (plain), or
# experts with three.
GATED = {
    "llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "olmo", "olmo2", "olmo3", "granite", "smollm3", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "cohere", "cohere2", "stablelm", "exaone4", "seed_oss", "ernie4_5",
    "helium", "hunyuan_v1_dense",
}  # fmt: skip
PLAIN = {"phi", "gpt_neox", "gpt2", "opt", "starcoder2", "nemotron", "apertus", "arcee"}
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe"}
# Model types that use their embedding as their head if the configuration does not say.
TIED = {"smollm3", "gemma", "gemma2", "gemma3_text", "gpt2", "opt", "cohere", "cohere2", "starcoder2", "ernie4_5"}
# The names that configurations have for each size.
NAMES = {
    "layers": identity.LAYER_NAMES,
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active": ("num_experts_per_tok",),
}
SOFTMAX = {"full_attention", "sliding_attention", "chunked_attention"}  # the layer types with softmax attention


@dataclass(frozen=True)
class Layer:
    """The number of weights in a layer.

    Attributes:
        attention: the weights of q, k, v and o.
        mlp: the weights of the MLP, or of all experts.
        active: the weights of `mlp` that one token uses.
        width: the inner activations of a token in the MLP, or in the experts that it uses.
    """

    attention: int
    mlp: int
    active: int
    width: int


@dataclass(frozen=True)
class Shape:
    """A teacher's sizes.

    Attributes:
        dtype: torch's name for the dtype of its weights.
        num_heads, num_key_value_heads, head_dim: the heads of every layer's attention, and their size.
        tied: whether the embedding is also the head.
    """

    model_type: str
    dtype: str
    layers: tuple[Layer, ...]
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @property
    def itemsize(self) -> int:
        """The bytes of a weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def embedding(self) -> int:
        """The number of weights in the embedding. The head has the same number."""
        return self.vocab_size * self.hidden_size

    @property
    def weights(self) -> int:
        """The number of all weights."""
        return sum(layer.attention + layer.mlp for layer in self.layers) + self.embedding * (1 if self.tied else 2)

    @property
    def attention_token(self) -> int:
        """The bytes of a token's q, k and v in one layer."""
        return (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim * self.itemsize

    @property
    def hidden_token(self) -> int:
        """The bytes of a token's hidden state."""
        return self.hidden_size * self.itemsize


def read_shape(teacher: str, revision: str | None = None) -> Shape:
    """The sizes of a teacher. It is a model folder, or a hub id from which config.json alone is fetched.

    Raises `BadInput` if there is no configuration, or if it is not understood.
    """
    folder = identity.find_folder(teacher)
    if folder is not None:
        return parse(identity.read_config(folder), teacher)

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(teacher, "config.json", revision=revision)

    return parse(identity.read_config(fetch(teacher, download).parent), teacher)


def parse(config: dict[str, Any], teacher: str) -> Shape:
    """The sizes that a configuration states; `teacher` names it in errors. Raises `BadInput`."""
    text = config.get("text_config", config)  # of a model that also sees images
    kind, where = str(text.get("model_type")), f"The configuration of {teacher}"
    if kind not in GATED | PLAIN | EXPERTS:
        raise BadInput(
            f"{where} has the model_type {kind[:40]!r}. `lolcats plan` does not know the sizes of this type. `lolcats "
            "capture` may still be able to convert the model: it tells before it starts."
        )
    if "quantization_config" in config or "quantization_config" in text:
        raise BadInput(f"{where} has a quantization_config. Use the model whose weights are not quantised.")
    other = sorted(set(map(str, text.get("layer_types") or ())) - SOFTMAX)
    if other:
        raise BadInput(
            f"{where} has layers of the type {other[0][:40]!r}, which have no softmax attention. `lolcats plan` cannot "
            "count them."
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"))
    dtype = "float32" if dtype == "None" else dtype.removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise BadInput(f"{where} has the dtype {dtype[:40]!r}. `lolcats plan` knows {', '.join(ITEMSIZE)}.")
    hidden, heads = _number(text, "hidden_size", where), _number(text, "num_heads", where)
    head_dim = _optional(text, "head_dim", where) or hidden // heads
    kv_heads = _optional(text, "num_key_value_heads", where) or heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    count = _number(text, "layers", where)
    return Shape(
        kind,
        dtype,
        tuple(_layer(text, kind, index, hidden, attention, where) for index in range(count)),
        hidden,
        heads,
        kv_heads,
        head_dim,
        _number(text, "vocab_size", where),
        bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", kind in TIED))),
    )


def _layer(text: dict[str, Any], kind: str, index: int, hidden: int, attention: int, where: str) -> Layer:
    dense = _optional(text, "intermediate", where) if kind in ("gpt2", "opt") else _number(text, "intermediate", where)
    dense = dense or 4 * hidden
    matrices = 2 if kind in PLAIN else 3
    sparse = (
        kind in EXPERTS
        and index >= (_optional(text, "first_k_dense_replace", where) or 0)
        and index not in (text.get("mlp_only_layers") or ())
        and (index + 1) % (_optional(text, "decoder_sparse_step", where) or 1) == 0
    )
    if not sparse:
        return Layer(attention, matrices * hidden * dense, matrices * hidden * dense, dense)
    size = _optional(text, "moe_intermediate_size", where) or dense
    shared = _optional(text, "shared_expert_intermediate_size", where) or 0
    shared += (_optional(text, "n_shared_experts", where) or 0) * size
    width = _number(text, "active", where) * size + shared
    everything = _number(text, "experts", where) * size + shared
    return Layer(attention, 3 * hidden * everything, 3 * hidden * width, width)


def _optional(text: dict[str, Any], what: str, where: str) -> int | None:
    """A size under any of its names; None if the configuration does not state it. Raises `BadInput` for a bad value."""
    for name in NAMES.get(what, (what,)):
        size = text.get(name)
        if size is not None:
            if not isinstance(size, int) or not 0 <= size <= identity.MAX_SIZE:
                raise BadInput(f"{where} has {name}: {str(size)[:40]}, which is not a size.")
            return size
    return None


def _number(text: dict[str, Any], what: str, where: str) -> int:
    size = _optional(text, what, where)
    if not size:
        raise BadInput(f"{where} does not state {' or '.join(NAMES[what])}. `lolcats plan` needs this size.")
    return size
