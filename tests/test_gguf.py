"""GGUF files: their tokenizers split text by the rule that the file names."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import patchsweep as ps
import pytest
import regex
from patchsweep.models.gguf import dequantised_folder
from patchsweep.models.pretokenizer import EXPRESSIONS, split_by
from patchsweep.models.tiny import tiny_model
from patchsweep.tasks import TASKS, load_task
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

TEXTS = [
    "a\n\n1. b",
    "Sum:  12",
    "in 2020\n\n2021 it's 3,141,592 O'Neil WE'LL",
    "  def f(self,\n\t\tx):  # Zoë's café\r\n    return 'naïve' + “日本語テスト” 한국어\n\n\n",
    "x²+½y≠∞ $5.00 ... a--b !!\n !\n?  ",
]


def pieces(rule: str, text: str) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    assert split_by(tokenizer, rule)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in cut]


def by_hand(rule: str, text: str) -> list[str]:
    """As llama.cpp cuts: each expression cuts what the ones before it left."""
    parts = [text]
    for expression in EXPRESSIONS[rule]:
        cut: list[str] = []
        for part in parts:
            end = 0
            for match in regex.finditer(expression, part):
                cut += [part[end : match.start()], match.group()]
                end = match.end()
            cut.append(part[end:])
        parts = [piece for piece in cut if piece]
    return parts


@pytest.mark.parametrize("rule", EXPRESSIONS)
def test_text_is_cut_by_one_expression_after_the_other(rule: str) -> None:
    for text in TEXTS:
        assert pieces(rule, text) == by_hand(rule, text)


@pytest.mark.parametrize("rule", sorted(EXPRESSIONS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()))
def test_rule_cuts_as_transformers_own_expression_does(rule: str) -> None:
    for text in TEXTS:
        found = regex.finditer(GGUF_PRE_TOKENIZER_SPLITS[rule], text)
        assert pieces(rule, text) == [match.group() for match in found]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a\n\n1. b", ["a", "ĊĊ", "1", ".", "Ġb"]),
        ("Sum:  12", ["Sum", ":", "ĠĠ", "1", "2"]),
        ("x  5", ["x", "ĠĠ", "5"]),
        ("line\n 12", ["line", "ĊĠ", "1", "2"]),
        ("in 2020\n\n2021", [*"in Ġ 2 0 2 0 ĊĊ 2 0 2 1".split()]),
        ("In 1732, 12 =", [*"In Ġ 1 7 3 2 , Ġ 1 2 Ġ=".split()]),
    ],
)
def test_bundled_model_splits_digits_off_first(
    smollm2: TransformerBridge, text: str, tokens: list[str]
) -> None:
    ids = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert smollm2.tokenizer.convert_ids_to_tokens(ids) == tokens


@pytest.mark.parametrize("task", TASKS)
def test_built_in_tasks_have_the_tokens_of_gpt2s_rule_too(
    smollm2: TransformerBridge, task: str
) -> None:
    """So the numbers that were recorded before the rule was read from the file still hold."""
    plain = Tokenizer.from_str(smollm2.tokenizer.backend_tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for pair in load_task(smollm2, task, n_pairs=None if task == "ioi_demo" else 16):
        for ids in (pair.clean, pair.corrupted):
            text = smollm2.tokenizer.decode(ids[1:])
            assert tuple(plain.encode(text, add_special_tokens=False).ids) == ids[1:]


def write_gguf(path: Path, pre: str | None) -> None:
    """The tiny llama as a GGUF file."""
    hf_model, tokenizer = tiny_model("llama")
    config, weights = hf_model.config, hf_model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i < 2 else 1 for _, i in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        to = top.get(module)
        if to is None:
            _, _, layer, *_, last = module.split(".")
            to = f"blk.{layer}.{names[last]}"
        writer.add_tensor(f"{to}.weight", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("pre", "named"), [("smollm", None), ("no-such-rule", "'no-such-rule'"), (None, "''")]
)
def test_rule_of_a_gguf_file_is_set_or_named_as_unknown(
    pre: str | None,
    named: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATCHSWEEP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, pre)
    for _ in range(2):  # converted, then found converted
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="patchsweep"):
            bridge = ps.load_model(str(path), device="cpu")
        words = [record.getMessage() for record in caplog.records]
        assert [f"tokenizer.ggml.pre={named}" in text for text in words] == [True] * bool(named)
        split = bridge.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
        assert len(split) == (4 if pre == "smollm" else 3)


def test_conversion_of_another_kind_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHSWEEP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "smollm")
    folder = dequantised_folder(path)
    older = folder.with_name(folder.name.rpartition("-v")[0])
    folder.rename(older)  # where versions without splitting rules put it
    assert dequantised_folder(path) == folder
    assert older.is_dir()
