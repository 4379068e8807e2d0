"""Tiny random models of further architectures, with the logits that llama.cpp and transformers compute for them.

    python benchmarks/reference_models/make.py --llama-cpp SOURCES --build BUILD [--seed 0] [-o FOLDER] [NAME …]

SOURCES is llama.cpp's tree (its converter and gguf-py are used), BUILD a folder with its libraries and with `logits`,
built from logits.cpp beside this file. Needs torch and transformers, which the project itself does not. Every weight
comes from a seeded generator and is exact in BF16, so the F32 file that llama.cpp runs and the BF16 file that is kept
hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

SHAPE = dict(
    vocab_size=384, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
MLA = dict(
    num_key_value_heads=4, q_lora_rank=40, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    intermediate_size=80, moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
    first_k_dense_replace=1,
)  # fmt: skip
GLM = dict(
    partial_rotary_factor=0.5, intermediate_size=80, moe_intermediate_size=24, n_routed_experts=8,
    num_experts_per_tok=3, n_group=1, topk_group=1, routed_scaling_factor=1.7,
)  # fmt: skip
PHI = dict(
    intermediate_size=32, num_local_experts=6, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
    sliding_window=None,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=64,
    short_mscale=1.1,
    long_mscale=1.2, short_factor=[1 + 0.1 * i for i in range(8)], long_factor=[1.5 + 0.5 * i for i in range(8)],
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=32,
            beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)  # fmt: skip

# name -> (its configuration, what is written over its config.json for the converter)
MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "olmoe": lambda: (hf.OlmoeConfig(**SHAPE | dict(num_key_value_heads=4), intermediate_size=24, num_experts=8,
                                     num_experts_per_tok=3, norm_topk_prob=False), {}),
    "glm4moe": lambda: (hf.Glm4MoeConfig(**SHAPE, **GLM, head_dim=24, n_shared_experts=1, first_k_dense_replace=1,
                                         norm_topk_prob=True, use_qk_norm=True, attention_bias=True), {}),
    "glm4moe-bare": lambda: (hf.Glm4MoeConfig(**SHAPE, **GLM, head_dim=16, n_shared_experts=2, first_k_dense_replace=2,
                                              norm_topk_prob=False, use_qk_norm=False), {}),
    "phimoe": lambda: (hf.PhimoeConfig(**SHAPE, **PHI, rope_parameters=LONGROPE),
                       {"architectures": ["PhiMoEForCausalLM"]}),
    "minimax-m2": lambda: (hf.MiniMaxM2Config(**SHAPE, head_dim=16, rotary_dim=8, intermediate_size=24,
                                              num_local_experts=8, num_experts_per_tok=3, scoring_func="sigmoid"), {}),
    "ernie4_5-moe": lambda: (hf.Ernie4_5_MoeConfig(**SHAPE, intermediate_size=96, moe_intermediate_size=24,
                                                   moe_num_experts=8, moe_k=3, moe_num_shared_experts=2,
                                                   moe_layer_start_index=1, moe_layer_end_index=2), {}),
    "dbrx": lambda: (hf.DbrxConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=384,
                                   attn_config=dict(kv_n_heads=2, clip_qkv=1.5, rope_theta=10000.0),
                                   ffn_config=dict(ffn_hidden_size=24, moe_num_experts=6, moe_top_k=2)), {}),
    "qwen35moe": lambda: (hf.Qwen3_5MoeTextConfig(
        **SHAPE | dict(num_hidden_layers=4, vocab_size=400), head_dim=24, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, num_experts=8, num_experts_per_tok=3, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, full_attention_interval=4,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
                             mrope_section=[2, 2, 2], mrope_interleaved=True)), {}),
    "deepseek-v2": lambda: (hf.DeepseekV2Config(**SHAPE | MLA, topk_method="greedy", n_group=1, topk_group=1,
                                                routed_scaling_factor=4.0, rope_parameters=YARN), {}),
    "kimi-k2": lambda: (hf.DeepseekV3Config(**SHAPE | MLA, n_group=1, topk_group=1, routed_scaling_factor=2.8,
                                            norm_topk_prob=True), {"scoring_func": "sigmoid"}),
}  # fmt: skip


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that logits are not flat and routers are decided; all exact in BF16."""
    generator = torch.Generator().manual_seed(seed)
    biases = [(name, buffer) for name, buffer in model.named_buffers() if "bias" in name]
    for name, old in [*model.named_parameters(), *biases]:
        noise = torch.randn(old.shape, generator=generator)
        if "A_log" in name:
            new = noise.abs()
        elif old.ndim == 1:  # the gain of a norm is about one, a bias about zero
            new = 0.2 * noise + (1.0 if old.detach().mean() > 0.5 else 0.0)
        elif "embed_tokens" in name or "wte" in name:
            new = noise
        else:
            is_router = old.shape[0] < 16 and ("gate" in name or "router" in name)
            new = noise * (2.5 if is_router else 1.4) / old.shape[-1] ** 0.5
        new = new.bfloat16().float()
        old.data.copy_(torch.where(new.abs() < 1e-4, 0.0, new))


def save_tokenizer(folder: Path) -> None:
    """All bytes and 126 pairs of them: nothing here tests tokenizers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(zip(letters, letters[1:127], strict=False))
    names = ["<|bos|>", "<|eos|>", *letters, *map("".join, pairs)]
    bpe = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = dict(bos_token="<|bos|>", eos_token="<|eos|>")
    hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)


def convert(folder: Path, target: Path, kind: str) -> None:
    """llama.cpp's converter, with any pre-tokenizer's name: it knows real models' tokenizers only."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    made = get_model_class(architecture)
    made.set_vocab = lambda self: self._set_vocab_gpt2()
    made.no_mtp = bool(getattr(made, "supports_mtp_export", False))
    with torch.inference_mode():
        made(folder, gguf.LlamaFileType[kind], target, eager=False, model_name=target.stem).write()


def llama_cpp(program: Path, model: Path, tokens: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The records that `logits` writes: logits [T, vocab], greedy [count], mid/l_out-L, mid/ffn_moe_topk-L."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "tokens"), Path(folder, "out")
        tokens.astype("<i4").tofile(given)
        subprocess.run([program, model, given, made, str(count)], check=True)
        raw, at, found = made.read_bytes(), 0, {}
    while at < len(raw):
        (length,) = struct.unpack_from("<i", raw, at)
        name = raw[at + 4 : at + 4 + length].decode()
        is_integer, columns, rows = struct.unpack_from("<iqq", raw, at + 4 + length)
        at += 24 + length
        numbers = np.frombuffer(raw, "<i4" if is_integer else "<f4", columns * rows, at).reshape(rows, columns)
        found[name if name in ("logits", "greedy") else f"mid/{name}"] = numbers[0] if name == "greedy" else numbers
        at += 4 * columns * rows
    return found


def make(name: str, seed: int, target: Path, program: Path) -> None:
    """Write NAME.BF16.gguf and NAME.npz, and say how far transformers is from llama.cpp."""
    config, overrides = MODELS[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id, config._attn_implementation = 0, 1, None, "eager"
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    random_weights(model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder, exact = Path(scratch, name), Path(scratch, f"{name}.F32.gguf")
        model.save_pretrained(folder)
        save_tokenizer(folder)
        page = folder / "config.json"
        page.write_text(json.dumps(json.loads(page.read_text()) | overrides))
        convert(folder, exact, "ALL_F32")
        convert(folder, target / f"{name}.BF16.gguf", "MOSTLY_BF16")
        tokens = np.random.default_rng(seed).integers(2, 384, 24).astype(np.int32)
        arrays = llama_cpp(program, exact, tokens, 16) | {"tokens": tokens}
    with torch.no_grad():
        arrays["logits_transformers"] = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    np.savez_compressed(target / f"{name}.npz", **arrays)
    gap = np.abs(arrays["logits"] - arrays["logits_transformers"]).max()
    print(f"{name}: transformers is {gap:.1e} from llama.cpp, std of logits {arrays['logits'].std():.2f}", flush=True)


def main() -> None:
    """Make the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="SOURCES")
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("tests/data/archs"))
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names or MODELS:
        make(name, args.seed, args.output, args.build / "logits")


if __name__ == "__main__":
    main()
