"""Models by name, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ModelError
from patchsweep.models import TINY_FAMILIES, load, load_model
from patchsweep.models import gguf as embedded
from patchsweep.models.gguf import BUNDLED, Bundled
from patchsweep.models.tiny import tiny_model
from subjects import demo_pairs, model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_family_is_the_same_each_time_and_its_prompts_matter(family: str) -> None:
    first, _ = tiny_model(family)
    second, _ = tiny_model(family)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    bridge = model(f"tiny:{family}")
    pair = demo_pairs(f"tiny:{family}")[0]
    with torch.no_grad():
        clean, corrupted = (bridge(torch.tensor([p]))[0, -1] for p in (pair.clean, pair.corrupted))
    assert float((clean - corrupted).abs().max()) > 0.1


def test_embedded_model_answers_the_demo_prompt(smollm2) -> None:
    prompt = "When John and Mary went to the shops, John gave a bottle of milk to"
    with torch.no_grad():
        logits = smollm2(smollm2.to_tokens(prompt))[0, -1]
    assert smollm2.to_string(logits.argmax()) == " Mary"
    assert not smollm2.training
    assert sum(p.numel() for p in smollm2.original_model.parameters()) > 100e6


def test_local_folder_loads_the_same_weights(tmp_path: Path) -> None:
    hf_model, tokenizer = tiny_model("llama")
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = load_model(str(tmp_path), device="cpu")
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.allclose(bridge(tokens), model("tiny:llama")(tokens), atol=1e-5)


def test_dtype_is_the_one_asked_for() -> None:
    bridge = load_model("tiny:llama", dtype="bfloat16")
    assert next(bridge.original_model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tiny:lama", {}, "tiny family 'lama' is not known; use one of"),
        ("no/such.gguf", {}, "GGUF file no/such.gguf does not exist"),
        ("./no-such-folder", {}, "'./no-such-folder' does not exist; give a folder that"),
        ("nobody/no-such-model", {}, "could not be loaded"),
        ("tiny:llama", {"dtype": "float8"}, "dtype 'float8' is not known; use one of float32"),
        ("tiny:llama", {"device": "cpu", "device_map": "auto"}, "exclude each other"),
    ],
)
def test_model_that_cannot_be_had_is_told(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, **arguments)


@pytest.mark.parametrize("also", [(), ("config.json", "model.safetensors")])
def test_adapter_is_told_to_be_merged_first(tmp_path: Path, also: tuple[str, ...]) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", *also):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter of PEFT.*merge it into its base model"):
        load_model(str(tmp_path))


def test_adapter_by_a_hub_name_is_told_to_be_merged_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model, tokenizer = tiny_model("llama")
    hf_model._hf_peft_config_loaded = True  # as transformers marks a model that it gave an adapter
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: hf_model)
    with pytest.raises(ModelError, match="'someone/adapter' is an adapter of PEFT"):
        load_model("someone/adapter", device="cpu")


def test_folder_without_a_model_and_file_of_another_kind_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(ModelError, match=r"weights\.bin' is a file; give a folder"):
        load_model(str(tmp_path / "weights.bin"))


def test_file_that_is_no_gguf_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSWEEP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="could not be read"):
        load_model(str(path))
    assert not list((tmp_path / "cache").glob("*"))


def test_embedded_file_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BUNDLED["smollm2-135m"]
    other = Bundled(real.package, real.file, "0" * 64)
    monkeypatch.setitem(embedded.BUNDLED, "smollm2-135m", other)
    with pytest.raises(ModelError, match=r"has SHA-256 b179.*, not 0000.*force-reinstall"):
        load_model("smollm2-135m")


def test_embedded_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedded.BUNDLED, "smollm2-135m", Bundled("no-such-package==1", "x", ""))
    with pytest.raises(ModelError, match=r"no-such-package==1, which is not installed; run: pip"):
        load_model("smollm2-135m")


def test_model_that_sees_both_ways_is_refused() -> None:
    bridge = ps.load_model("tiny:llama")
    bridge.cfg.attention_dir = "bidirectional"
    with pytest.raises(ModelError, match="attends in both directions"):
        ps.sweep(bridge, demo_pairs("tiny:llama"), "z")
