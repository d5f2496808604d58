"""What is fed is what was written: start tokens, and answers that follow their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
from patchsweep.data.pairs import UnfitPair
from patchsweep.data.tokenize import token_ids
from patchsweep.errors import PromptError
from patchsweep.models import TINY_FAMILIES
from patchsweep.models.tiny import tiny_model
from subjects import CLEAN, CORRUPTED, model
from tokenizers import Tokenizer, processors
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

NAMES = ("smollm2-135m", "tiny:llama", "tiny:gpt2", "tiny:qwen3")
TEXTS = [CLEAN, "a", " a", "In 1732, 12 + 34 =", "Zoë 日本!\n", "a\n\n  b  c "]


def one(bridge: TransformerBridge, clean: str, corrupted: str, *answers: str, **more: Any) -> Any:
    return ps.PromptPairs.from_strings(
        bridge, clean=[clean], corrupted=[corrupted], answers=[answers], **more
    )[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_bridge(name: str, text: str) -> None:
    bridge = model(name)
    assert list(token_ids(bridge, text)) == bridge.to_tokens(text)[0].tolist()
    plain = bridge.to_tokens(text, prepend_bos=False)[0].tolist()
    assert list(token_ids(bridge, text, alone=True)) == plain
    assert list(token_ids(bridge, text, prepend_bos=False)) == plain


def test_chat_template_keeps_its_one_start_token(smollm2: TransformerBridge) -> None:
    clean, corrupted = (
        smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Name the colour of {thing}."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for thing in ("grass", "blood")
    )
    pair = one(smollm2, clean, corrupted, "Green", "Red")
    assert pair.clean_tokens[:4] == ("<|im_start|>", "system", "\n", "You")
    assert list(pair.clean) == smollm2.tokenizer(clean, add_special_tokens=False)["input_ids"]
    assert pair.clean_tokens.count("<|im_start|>") == clean.count("<|im_start|>")


@pytest.mark.parametrize("name", ["smollm2-135m", "tiny:llama", "tiny:gpt2"])
def test_start_token_comes_once_or_as_it_is_asked_for(name: str) -> None:
    bridge = model(name)
    start = bridge.tokenizer.bos_token
    written = one(bridge, start + CLEAN, start + CORRUPTED, " Mary", " John")
    assert written.clean == one(bridge, CLEAN, CORRUPTED, " Mary", " John").clean
    assert written.clean_tokens[:2] == (start, "When")
    twice = one(bridge, start + CLEAN, start + CORRUPTED, " Mary", " John", prepend_bos=True)
    assert twice.clean_tokens[:3] == (start, start, "When")
    bare = one(bridge, CLEAN, CORRUPTED, " Mary", " John", prepend_bos=False)
    assert bare.clean_tokens[0] == "When"
    assert bare.clean == written.clean[1:]


def test_start_token_can_be_left_out_of_a_file_of_pairs(
    llama: TransformerBridge, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    entry = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong_answer": " John"}
    path.write_text(json.dumps(entry))
    pair = ps.PromptPairs.from_jsonl(llama, path, prepend_bos=False)[0]
    assert pair.clean_tokens[0] == "When"


def save_without_start(family: str, folder: Path) -> None:
    """A tiny model whose tokenizer has an end token, and no start token."""
    hf_model, tokenizer = tiny_model(family)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    hf_model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_tokenizer_without_a_start_token_gets_no_other_in_front(
    family: str, tmp_path: Path
) -> None:
    save_without_start(family, tmp_path)
    bridge = ps.load_model(str(tmp_path), device="cpu")
    assert one(bridge, CLEAN, CORRUPTED, " Mary", " John").clean_tokens[:2] == ("When", " John")
    assert bridge.to_str_tokens(CLEAN)[0] == "When"  # TransformerLens's own tools agree
    with pytest.raises(PromptError, match="has no start token; leave prepend_bos out"):
        one(bridge, CLEAN, CORRUPTED, " Mary", " John", prepend_bos=True)


def test_bridge_that_took_the_end_token_for_a_start_token_is_read_right(tmp_path: Path) -> None:
    save_without_start("llama", tmp_path)
    bridge = ps.load_model(str(tmp_path), device="cpu")
    bridge.cfg.default_prepend_bos = True  # as a bridge that its user made has it
    assert bridge.tokenizer.bos_token == "</s>"
    assert one(bridge, CLEAN, CORRUPTED, " Mary", " John").clean_tokens[0] == "When"


def test_end_token_as_an_answer_and_in_a_prompt_is_kept(tmp_path: Path) -> None:
    save_without_start("llama", tmp_path)
    bridge = ps.load_model(str(tmp_path), device="cpu")
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    bridge.tokenizer.backend_tokenizer.post_processor = template
    bridge.cfg.tokenizer_appends_eos = True
    assert bridge.tokenizer("a")["input_ids"][-1] == 1
    pair = one(bridge, f"{CLEAN}</s>", f"{CORRUPTED}</s>", "</s>", " John")
    assert pair.clean_tokens[-2:] == (" to", "</s>")
    assert pair.answer == (1,)


@pytest.mark.parametrize(
    ("clean", "corrupted", "answers", "words"),
    [
        (
            "He is ", "She is ", ("happy", "good"),
            r"answer 'happy' must follow .* one by one are \[.*' is', ' ', 'happy'\], and as one "
            r"text \[.*' is', ' happy'\].*end the prompt at 'He is' and give the answer ' happy'$",
        ),
        ("He is  ", "She is  ", ("happy", "good"), "end the prompt at 'He is ' and .* ' happy'"),
        ("He is ", "She is ", ("happy", "sad"), "give the answer ' happy'"),
        (
            "He lives in New Yor", "She lives in New Yor", ("k", "x"),
            r"\[.*' New', ' Yor', 'k'\].*end the prompt at 'He lives in New' and .* ' York', or",
        ),
        ("Sit on the", "Sit on this", ("mat", " mat"), "or give the answer ' mat'"),
        ("He is", "She is", ("Helsinki", " good"), "' Helsinki', with a leading space"),
    ],
)  # fmt: skip
def test_answer_that_does_not_keep_the_prompts_tokens_is_refused(
    smollm2: TransformerBridge, clean: str, corrupted: str, answers: tuple[str, str], words: str
) -> None:
    with pytest.raises(UnfitPair, match=words):
        one(smollm2, clean, corrupted, *answers)


@pytest.mark.parametrize("end", ["\n", "\t", ":", " 1", "(", "\n\n"])
def test_answer_after_a_prompt_that_ends_a_token_is_taken(
    smollm2: TransformerBridge, end: str
) -> None:
    pair = one(smollm2, f"He is{end}", f"She is{end}", "2", "3")
    whole = smollm2.tokenizer(f"He is{end}2", add_special_tokens=False)["input_ids"]
    assert [*pair.clean[1:], *pair.answer] == whole


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_models_are_loaded_with_their_tokenizers_rule(family: str) -> None:
    assert model(f"tiny:{family}").tokenizer.bos_token == "<s>"
    pair = one(model(f"tiny:{family}"), CLEAN, CORRUPTED, " Mary", " John")
    assert (pair.clean_tokens[0] == "<s>") == model(f"tiny:{family}").cfg.default_prepend_bos
