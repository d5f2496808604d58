r"""Rules by which the tokenizer of a GGUF file splits text before it merges bytes.

A GGUF names its rule in `tokenizer.ggml.pre`; the file does not hold the expressions. These are
those of llama.cpp (`llm_tokenizer_bpe` and `llama_vocab::impl::load` in src/llama-vocab.cpp, commit
00ad355e, https://github.com/ggml-org/llama.cpp). Where llama.cpp quotes the original tokenizer's
expression beside an adapted one, this module has the original. Each expression of a rule cuts the
pieces that the previous expressions left; matches and the text between them become pieces. Rare
rules, and those with special code in llama.cpp (afmoe, kimi-k2, superbpe), are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.integrations.gguf.reader import read_gguf_metadata

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# words by case with their suffixes, digits, punctuation, spaces
_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_LLAMA3 = _CL100K % r"\p{N}{1,3}"
_NO_PUNCTUATION = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# names of a rule -> its expressions
_RULES: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe "
    "gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling": (_GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (r"\p{N}", _GPT2),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "chatglm-bpe glm4": (_LLAMA3,),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (
        _CL100K % r"\p{N}",
    ),
    "qwen35": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "tekken": (_BY_CASE % ("", "", r"\p{N}"),),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (
        _BY_CASE % (f"{_SHORT}?", f"{_SHORT}?", r"\p{N}{1,3}"),
    ),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK3,
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "poro-chat bloom gpt3-finnish": (_NO_PUNCTUATION,),
    "viking": (_NO_PUNCTUATION, r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
EXPRESSIONS = {name: rule for names, rule in _RULES.items() for name in names.split()}
# rules under which a piece in the vocabulary is one token, even if no merges lead to it
_WHOLE_PIECES = {
    *"llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split(),
    "tekken",
}


def rule_of(path: Path) -> str | None:
    """Return the name of the GGUF file's splitting rule, "" if the file names none.

    None for tokenizers that are not byte-level, which have no such rule.
    """
    metadata, _ = read_gguf_metadata(str(path))
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    return str(metadata.get("tokenizer.ggml.pre", ""))


def split_by(tokenizer: Tokenizer, rule: str) -> bool:
    """Set a byte-level tokenizer to split by llama.cpp's `rule`; False if the rule is unknown."""
    expressions = EXPRESSIONS.get(rule)
    if expressions is None:
        return False
    cuts: list[Any] = [pre_tokenizers.Split(Regex(x), behavior="isolated") for x in expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if rule in _WHOLE_PIECES:
        model = tokenizer.model
        model.ignore_merges = True
        tokenizer.model = model
    return True
