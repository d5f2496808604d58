"""Chat prompts: the tokenizer's own template, one start token, roles as labels."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.cli.schema.task import FileTask, TextTask
from patchsweep.data.pairs import PromptPairs, PromptRecord
from patchsweep.data.records import CharSpan
from patchsweep.errors import PromptError
from subjects import model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

CLEAN = "Name the capital of France in one word."
CORRUPTED = "Name the capital of Italy in one word."
ANSWERS = ("Paris", "Rome")
# how five families write a chat; the names are those of tiny models with their start tokens
TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma2": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mixtral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gpt2": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}


def messages(text: str, system: str | None = None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def of_template(bridge: TransformerBridge, chat: list[dict[str, str]]) -> list[int]:
    """The ids of the tokenizer's own template: what the model's authors feed it."""
    ids = bridge.tokenizer.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return [int(i) for i in ids]


def chat_pairs(bridge: TransformerBridge, **more: Any) -> PromptPairs:
    return PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[ANSWERS], template="chat", **more
    )


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_has_the_templates_tokens_and_one_start_token(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = model(f"tiny:{family}")
    monkeypatch.setattr(bridge.tokenizer, "chat_template", TEMPLATES[family])
    (pair,) = chat_pairs(bridge, multi_token=True)
    assert list(pair.clean) == of_template(bridge, messages(CLEAN))
    assert list(pair.corrupted) == of_template(bridge, messages(CORRUPTED))
    start = bridge.tokenizer.bos_token_id
    assert pair.clean.count(start) == ("bos_token" in TEMPLATES[family])
    first, stop = pair.labels["user"]
    assert "".join(pair.clean_tokens[first:stop]).strip() == CLEAN
    one_more = chat_pairs(bridge, multi_token=True, prepend_bos=True)[0].clean
    assert one_more == (start, *pair.clean)


def test_roles_of_every_message_are_labels() -> None:
    bridge = model("smollm2-135m")
    chat = [
        *messages("Name the capital of Spain in one word.", "You answer in one word."),
        {"role": "assistant", "content": "Madrid"},
    ]
    record = PromptRecord(
        [*chat, *messages(CLEAN)],
        [*chat, *messages(CORRUPTED)],
        *ANSWERS,
        labels={"country": "France", "verb": CharSpan(0, 4)},
        template="chat",
    )
    (pair,) = PromptPairs.from_records(bridge, [record])
    texts = {k: "".join(pair.clean_tokens[slice(*v)]).strip() for k, v in pair.labels.items()}
    assert texts == {
        "system": "You answer in one word.",
        "user": "Name the capital of Spain in one word.",
        "assistant": "Madrid",
        "user_2": CLEAN,
        "country": "France",
        "verb": "Name",
    }
    assert list(pair.clean) == of_template(bridge, [*chat, *messages(CLEAN)])


def test_chat_pairs_equal_a_transformer_lens_run_on_the_same_tokens() -> None:
    bridge = model("smollm2-135m")
    pairs = chat_pairs(bridge)
    ids = {
        name: torch.tensor([of_template(bridge, messages(text))])
        for name, text in (
            ("clean", CLEAN),
            ("corrupted", CORRUPTED),
        )
    }
    answer, wrong = (bridge.tokenizer(a, add_special_tokens=False)["input_ids"] for a in ANSWERS)
    assert (len(answer), len(wrong)) == (1, 1)

    def logit_diff(logits: Tensor) -> float:
        return (logits[0, -1, answer[0]] - logits[0, -1, wrong[0]]).item()

    def put(x: Tensor, hook: Any, *, new: Tensor, pos: int) -> Tensor:
        x = x.clone()
        x[:, pos] = new[:, pos]
        return x

    ds = ps.sweep(
        bridge,
        pairs,
        "resid_pre",
        layers=[3, 15, -1],
        positions=["country", "end"] if "country" in pairs[0].labels else ["user", "end"],
    )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids["clean"])
        base = logit_diff(bridge(ids["corrupted"]))
        last = ids["clean"].shape[1] - 1
        expected = []
        for layer in (3, 15, 29):
            name = f"blocks.{layer}.hook_resid_pre"
            hook = partial(put, new=cache[name], pos=last)
            expected.append(
                logit_diff(bridge.run_with_hooks(ids["corrupted"], fwd_hooks=[(name, hook)]))
            )
    assert base == pytest.approx(ds.base_metric.item(), abs=1e-3)
    assert abs(base - expected[-1]) > 1
    # another order of the same fp32 products; logits of order 20
    np.testing.assert_allclose(ds["resid_pre"].sel(pos="end").values.ravel(), expected, atol=1e-3)


def test_files_and_commands_take_chats(tmp_path: Path) -> None:
    bridge = model("smollm2-135m")
    expected = chat_pairs(bridge)
    row = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": ANSWERS[0], "wrong_answer": ANSWERS[1]}
    listed = {**row, "clean": messages(CLEAN), "corrupted": messages(CORRUPTED)}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({**r, "template": "chat"}) for r in (row, listed)))
    found = PromptPairs.from_jsonl(bridge, path)
    assert found.pairs == expected.pairs * 2
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps(row))
    assert FileTask(str(plain), template="chat").load(bridge) == expected
    assert TextTask(**row, template="chat").load(bridge) == expected


@pytest.mark.parametrize(
    ("clean", "template", "words"),
    [
        (CLEAN, "chatml", "template='chatml' is not known; use 'chat'"),
        (CLEAN, "chat", "has no chat template; leave template out, or use an instruct model"),
    ],
)
def test_what_is_no_chat_is_refused(clean: Any, template: str, words: str) -> None:
    bridge = model("tiny:llama")
    assert bridge.tokenizer.chat_template is None
    record = PromptRecord(clean, CORRUPTED, *ANSWERS, template=template)
    with pytest.raises(PromptError, match=words):
        PromptPairs.from_records(bridge, [record])


def test_bad_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = model("tiny:llama")
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    monkeypatch.setattr(bridge.tokenizer, "chat_template", template)
    cases: list[tuple[Any, str]] = [
        ([{"role": "user"}], "a message must be a mapping of role and content"),
        ([{"role": "system", "content": "a"}], "the chat template refuses these messages"),
        (5, "must be a text or a list of messages"),
    ]
    for clean, words in cases:
        with pytest.raises(PromptError, match=words):
            PromptPairs.from_records(bridge, [PromptRecord(clean, "b", "c", "d", template="chat")])
