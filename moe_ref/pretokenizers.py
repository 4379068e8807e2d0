r"""How a byte-level BPE tokenizer cuts text before merging: one row a `tokenizer.ggml.pre`, as llama.cpp cuts it.

A row is a list of regular expressions (Oniguruma's dialect, that of the `tokenizers` library). Each cuts every piece
that the one before it left into matches and what lies between matches; look-around sees its piece alone.

Where llama.cpp and a model's own tokenizer.json disagree, llama.cpp is followed: the file's user compares with it.

* It has no case properties: `\p{Lu}` and `\p{Ll}` are any letter there (gpt-4o: only A-Z and a-z have case;
  youtu, tiny_aya: nothing has), and gpt-4o, tekken, kimi-k2 do not keep combining marks with their letters.
* Patterns without `\p{..}` see every whitespace beyond ASCII as one control character: it is in no range of theirs.
* Its Unicode tables are version 15.1; Oniguruma's may be newer (16.0 in tokenizers 0.23), and then the 5185 letters,
  digits and symbols new since are recognised here and not there.

Source: llama.cpp 0.5.0-dev, src/llama-vocab.cpp (names, patterns, flags) and src/unicode.cpp (splitters by hand).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FALCON_END_OF_TEXT = 11  # what llama.cpp takes for bos and eos when a file names none


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of cutting text, and the flags that llama.cpp ties to its name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is that token, whatever the merges say
    add_bos: bool = False  # when `tokenizer.ggml.add_bos_token` is absent
    bos_id: int | None = FALCON_END_OF_TEXT  # when `tokenizer.ggml.bos_token_id` is absent


def ranges(codes: str) -> str:
    """Hexadecimal code points and ranges as the inside of a character class: '41-5a b5' -> '\\x{41}-\\x{5a}\\x{b5}'."""
    return "".join("-".join(f"\\x{{{end}}}" for end in span.split("-")) for span in codes.split())


CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"  # one leading character of any other kind goes with its word
MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"  # the last space of a run belongs to the word behind it
DIGITS = r"\p{N}{1,3}"
ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
CJK_KANA = f"[{ranges('4e00-9fa5 3040-309f 30a0-30ff')}]+"

GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = f"{CONTRACTION}|{WORD}|\\p{{N}}|{SIGNS}|{SPACES}"
LLAMA3 = f"{CONTRACTION}|{WORD}|{DIGITS}|{SIGNS}|{SPACES}"
DEEPSEEK3 = ASCII_SIGN + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"


def cased(digits: str, contraction: str = f"(?:{CONTRACTION})?", letter: str = r"\p{L}") -> str:
    """The o200k family: a word may start in capitals and go on in small letters; only A-Z and a-z have case."""
    upper, lower = f"[{letter}&&[^a-z]]", f"[{letter}&&[^A-Z]]"
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}{contraction}" for word in (f"{upper}*{lower}+", f"{upper}+{lower}*")]
    return "|".join([*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES])


# Thousands from the right, 1234567 -> 1|234|567; what precedes the first digit stays with it (llama.cpp's splitter
# for afmoe and tiny_aya). The look-ahead finds a run's length once, then "a digit before" tells the rest.
THOUSANDS = r"(?<=\p{N})\p{N}{3}|(?:\A|(?<=\p{N}))\P{N}*+\p{N}{1,3}?(?=(?:\p{N}{3})*+(?!\p{N}))"
# The same cuts and no others (superbpe): before the last three digits, where nothing is matched, and around the rest.
THOUSANDS_ALONE = "(?<=[0-9]{3})[0-9]{3}(?=[0-9])|[0-9]{3}(?=(?:[0-9]{3})++(?![0-9]))|(?=[0-9]{3}(?![0-9]))"

DEEPSEEK_LETTERS = ranges(
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a "
    "1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 "
    "212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d "
    "a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
DEEPSEEK_CJK = f"[{ranges('4e00-9fa5 800-4e00 ac00-d7ff')}&&\\S]+"
AFMOE_ASIAN = ranges(
    "4e00-9fff 3400-4dbf 8c48-faff 3040-309f 30a0-30ff ff65-ff9f 2f00-2fdf e40-e7f e80-eff 1780-17ff 1000-109f "
    "aa60-aa7f a9e0-a9ff ac00-d7af 1100-11ff"
)
YOUTU_ASIAN = "|".join(
    f"[{ranges(codes)}]+"
    for codes in (
        "ac00-d7a3 3131-318e",
        "ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f",
        "3105-312f",
        "4e00-9fa5 3040-309f 30a0-30ff",
    )
)
HAN = ranges("4e00-9fff 3400-4dbf 20000-2a6df 2a700-2b73f 2b740-2b81f 2b820-2ceaf 2ceb0-2ebef f900-faff 2f800-2fa1f")
BLOOM_STOPS = ranges("2026 3002 ff0c 3001 964 6d4 60c")
BLOOM = rf" ?[^(\s|.,!?{BLOOM_STOPS})]+"

KIMI_K2 = "|".join(
    [
        f"[{HAN}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{HAN}]]+(?:{CONTRACTION})?",
        DIGITS,
        SIGNS,
        SPACES,
    ]
)
# \s*[\r\n]+ cannot match after a space that an earlier \s{..} took; saying so keeps long runs linear.
JAIS2_SPACES = r"(?<![^\S\r\n])\s*[\r\n]+|" + "|".join(
    rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)

_GPT2 = PreTokenizer((GPT2,))
_DIGIT_GPT2 = PreTokenizer((r"\p{N}", GPT2))
_QWEN2 = PreTokenizer((QWEN2,))
_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_PLAIN_LLAMA3 = PreTokenizer((LLAMA3,))
_DEEPSEEK3 = PreTokenizer((DIGITS, CJK_KANA, DEEPSEEK3 + r"[\r\n]*|" + SPACES))
_GPT4O = PreTokenizer((cased(DIGITS),))
_THOUSANDS_O200K = f"{MARKED_WORD}(?:{CONTRACTION})?|{DIGITS}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{SPACES}"
_BAILING = f"{CONTRACTION}|{WORD}|\\p{{N}}|{SIGNS}|" + r"\s*[\r\n]|\s+(?!\S)|\s+"
_BLOOM = PreTokenizer((BLOOM,))

_ROWS: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe exaone4 mpt olmo jais trillion granite-docling": _GPT2,
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _DIGIT_GPT2,
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]")),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _QWEN2,
    "qwen35": PreTokenizer(
        (f"{CONTRACTION}|{MARKED_WORD}|\\p{{N}}|" + r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,),
    ),
    "laguna": PreTokenizer((r"[^\n]+|\n+", QWEN2)),
    "ufakzeka": PreTokenizer((f"{WORD}|\\p{{N}}|{SIGNS}|{SPACES}",)),
    "seed-coder": PreTokenizer((f"{CONTRACTION}|{WORD}|\\p{{N}}|" + r" ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    "exaone-moe": PreTokenizer(
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}[\p{{L}}\p{{M}}]*+(?: \p{{L}}[\p{{L}}\p{{M}}]*+)*+|\p{{N}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _LLAMA3,
    "dbrx smaug-bpe": _PLAIN_LLAMA3,
    "chatglm-bpe": replace(_PLAIN_LLAMA3, bos_id=None),
    "glm4 glm5": replace(_PLAIN_LLAMA3, bos_id=None, ignore_merges=True),
    "jais-2": PreTokenizer((f"{CONTRACTION}|{WORD}|{DIGITS}|{SIGNS}|{JAIS2_SPACES}|\\s",)),
    "minicpm5": PreTokenizer((DIGITS, f"{CONTRACTION}|{WORD}|\\p{{N}}+|{SIGNS}|{SPACES}"), ignore_merges=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "granite-embed-multi-97m": PreTokenizer((cased(DIGITS, letter=r"[\p{L}\p{M}]"),), ignore_merges=True),
    "tekken": PreTokenizer((cased(r"\p{N}", contraction=""),), ignore_merges=True, add_bos=True),
    "youtu": PreTokenizer((YOUTU_ASIAN, _THOUSANDS_O200K.replace(DIGITS, r"\p{N}")), ignore_merges=True),
    "tiny_aya cohere2moe": PreTokenizer((THOUSANDS, _THOUSANDS_O200K)),
    "afmoe": PreTokenizer((THOUSANDS, f"[{AFMOE_ASIAN}]+", _DEEPSEEK3.patterns[2])),
    "superbpe": PreTokenizer((r"\p{N}+", THOUSANDS_ALONE)),
    "kimi-k2": PreTokenizer((KIMI_K2,)),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": _DEEPSEEK3,
    "spark2_5": PreTokenizer((DIGITS, CJK_KANA, DEEPSEEK3 + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{DEEPSEEK_LETTERS}]+",
            rf"\s?[!-/:-~{ranges('ff01-ff0f ff1a-ff5e 2018-201f 3001-3002')}]+",
            r"(?<!\s)\s+\z",
            DEEPSEEK_CJK,
            r"\p{N}+",
        ),
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}")),
    "poro-chat bloom gpt3-finnish": _BLOOM,
    "viking": PreTokenizer((BLOOM, r"\p{N}")),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        add_bos=True,
    ),
}

PRETOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class SpaceMarked:
    """A name whose tokens are plain text with ▁ for a space, not bytes (spm.py); cut at runs of newlines alone."""

    whole_newlines: bool = False  # a run of newlines that is a token is that token, whatever the merges say
    always_bos: bool = False  # even against `tokenizer.ggml.add_bos_token`


GEMMA4 = SpaceMarked(whole_newlines=True, always_bos=True)
SPACE_MARKED = {"gemma4": GEMMA4, "granite-embed-multi-311m": GEMMA4, "sarvam-moe": SpaceMarked()}

# Known to llama.cpp, but neither: plain text whose spaces are dropped (embeddings of Jina).
NOT_BYTE_LEVEL = ("whitespace",)
