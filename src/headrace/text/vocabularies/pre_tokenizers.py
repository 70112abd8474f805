"""How text is cut before byte-level BPE, by the names that GGUF files give to the ways.

The names, and which regular expressions are applied one after the other, are those of llama.cpp;
the expressions are those of the models' own ``tokenizer.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}|{_SPACES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_DEEPSEEK_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A
38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_DEEPSEEK_SIGNS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_DEEPSEEK_IDEOGRAPHS = "4E00-9FA5 800-4E00 AC00-D7FF"
_DEEPSEEK_V3_IDEOGRAPHS = "4E00-9FA5 3040-309F 30A0-30FF"


def _characters(ranges: str) -> str:
    """The inside of a character class, from code points in hexadecimal."""
    pairs = [each.split("-") for each in ranges.split()]
    return "".join("-".join(chr(int(end, 16)) for end in pair) for pair in pairs)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What happens to a text before byte-level BPE.

    Args:
        splits: regular expressions in Oniguruma's syntax, one after the other: what matches becomes
            a part of its own, and so does what is between matches.
        normalizes: the text is first brought to Unicode's form NFC.
        ignores_merges: a part that is a token becomes it, whatever the merges make of it.
        adds_bos: a text begins with the token for that where the file does not say.
    """

    splits: tuple[str, ...]
    normalizes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


GPT2 = PreTokenizer((_GPT2,))
QWEN2 = PreTokenizer((_QWEN2,), normalizes=True)
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)
_O200K = PreTokenizer((_GPT4O,))
_CL100K = PreTokenizer((_LLAMA3,))

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "mpt": PreTokenizer((_GPT2,), normalizes=True),
    "olmo": PreTokenizer((_GPT2,), normalizes=True),
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "command-r": PreTokenizer(_DIGITS.splits, normalizes=True),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "falcon-h1": _LLAMA_BPE,
    "lfm2": _LLAMA_BPE,
    "pixtral": _LLAMA_BPE,
    "midm-2.0": _LLAMA_BPE,
    "jina-v5-nano": _LLAMA_BPE,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "qwen2": QWEN2,
    "qwen35": PreTokenizer((_QWEN35,), normalizes=True),
    "stablelm2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "megrez": QWEN2,
    "kormo": QWEN2,
    "f2llmv2": QWEN2,
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_characters(_DEEPSEEK_LETTERS)}]+",
            rf"\s?[{_characters(_DEEPSEEK_SIGNS)}]+",
            r"\s+$",
            f"[{_characters(_DEEPSEEK_IDEOGRAPHS)}]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            f"[{_characters(_DEEPSEEK_IDEOGRAPHS)}]+",
            r"\p{N}",
        )
    ),
    "deepseek-v3": PreTokenizer(
        (r"\p{N}{1,3}", f"[{_characters(_DEEPSEEK_V3_IDEOGRAPHS)}]+", _DEEPSEEK_V3)
    ),
    "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "kanana2": _O200K,
    "talkie": _O200K,
    "minimax-m2": _O200K,
}
"""By name. Several names may stand for one way."""
