"""How many sequences vLLM has room for beside the weights of Llama 3 8B: its student, and the softmax model.

    python benchmarks/serving_memory.py

In an environment with vLLM (`make test-vllm` makes one). Nothing is loaded: vLLM itself plans its pages from the
layers' specifications, for 80 GB of which it may use 92%, bf16 weights, and sequences of 32,768 tokens.
"""

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from lolcats_kernels import HybridConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from lolcats_cli.serving import register
from lolcats_cli.serving.layer import HybridAttentionLayer
from lolcats_cli.serving.model import layer_shape

CONTEXT = 32768
WEIGHTS = 8.03e9 * 2
ROOM = int(80e9 * 0.92 - WEIGHTS)
LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 32, 32, 8, 128
LLAMA = {
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


def sequences(kept: int | None, *, prefix_caching: bool, state_bytes: int = 4) -> tuple[float, int]:
    """How many sequences fit, and the tokens of an attention block; kept: how many layers of the student stay softmax,
    None for the softmax model itself. state_bytes: of an element of the sums: 4 as they are, or 2 for a trial."""
    config = LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if kept is not None:
        converted = [layer for layer in range(LAYERS) if layer >= kept]
        hybrid = {"feature_dim": 64, "window": 64, "linear_factor": "exp"}
        config |= {"model_type": "lolcats_llama", "architectures": ["LolcatsForCausalLM"]}
        config["lolcats"] = {"hybrid": hybrid, "layers": converted, "num_heads": HEADS, "head_dim": HEAD_DIM}
        assert HybridConfig(**hybrid)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = {"max_model_len": CONTEXT, "enable_prefix_caching": prefix_caching, "skip_tokenizer_init": True}
        made = EngineArgs(folder, dtype="bfloat16", block_size=16, **options).create_engine_config()
    cache, specs = made.cache_config, {}
    with set_current_vllm_config(made), patch("lolcats_cli.serving.layer.keys_wait", lambda: True):  # as on a GPU
        if kept:
            Platform._align_hybrid_block_size.__func__(Aligned, made, TritonAttentionBackend)
        for layer in range(LAYERS):
            if kept is None or layer < kept:
                specs[f"{layer}"] = FullAttentionSpec(
                    block_size=cache.block_size, num_kv_heads=KEY_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
                )
            else:
                specs[f"{layer}"] = state_spec(made, f"{layer}", state_bytes)
        resolve_kv_cache_layout(made, [[layout.name for layout in KVCacheLayout]], specs.values())
    (planned,) = get_kv_cache_configs(made, [specs], [ROOM])
    return get_max_concurrency_for_kv_cache_config(made, planned), cache.block_size


class Aligned(Platform):
    """The rule that GPUs have for blocks; attention layers, which it looks for, are not built here."""

    @classmethod
    def _find_non_ssm_backends(cls, vllm_config):
        return [TritonAttentionBackend]


def state_spec(vllm_config, name: str, state_bytes: int):
    shape = layer_shape(vllm_config)
    layer = HybridAttentionLayer(shape, shape, vllm_config, name, scaling=1.0, softcap=None, sinks=None)
    if state_bytes == 2:
        layer.get_state_dtype = lambda: (torch.bfloat16,) * 4
    return layer.get_kv_cache_spec(vllm_config)


def main() -> None:
    softmax, _ = sequences(None, prefix_caching=False)
    print(f"softmax model: {softmax:.1f} sequences of {CONTEXT:,} tokens")
    for kept in (0, 2, 8):
        for caching in (False, True):
            found, block = sequences(kept, prefix_caching=caching)
            what = f"student, {kept} layers kept, prefix caching {'on' if caching else 'off'}"
            print(f"{what}: {found:.0f} sequences, {found / softmax:.1f} times; attention blocks of {block} tokens")
    found, _ = sequences(0, prefix_caching=False, state_bytes=2)
    print(f"student, sums in bf16, prefix caching off: {found:.0f} sequences, {found / softmax:.1f} times")


if __name__ == "__main__":
    register()
    main()
