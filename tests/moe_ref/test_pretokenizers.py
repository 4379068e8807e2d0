"""Every name that llama.cpp accepts under `tokenizer.ggml.pre` has a row here, with the flags tied to it there."""

from __future__ import annotations

from moe_ref.pretokenizers import NOT_BYTE_LEVEL, PRETOKENIZERS, SPACE_MARKED

# llama.cpp 0.5.0-dev, src/llama-vocab.cpp, llama_vocab::impl::load: the names compared with, and what is set for them.
NAMES = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4
gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2
hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0
minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka
viking whitespace youtu
"""
IGNORE_MERGES = """
falcon-h1 falcon3 glm4 glm5 granite-embed-multi-97m jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 minicpm5
pixtral tekken youtu
"""
ADD_BOS = "chameleon falcon-h1 falcon3 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral tekken"
NO_DEFAULT_BOS = "chatglm-bpe glm4 glm5"


def test_each_name_of_llama_cpp_is_known_and_no_other() -> None:
    assert sorted([*PRETOKENIZERS, *SPACE_MARKED, *NOT_BYTE_LEVEL]) == NAMES.split()


def test_flags_of_each_name_are_those_of_llama_cpp() -> None:
    rows = sorted(PRETOKENIZERS.items())
    assert [name for name, row in rows if row.ignore_merges] == IGNORE_MERGES.split()
    assert [name for name, row in rows if row.add_bos] == ADD_BOS.split()
    assert [name for name, row in rows if row.bos_id is None] == NO_DEFAULT_BOS.split()
