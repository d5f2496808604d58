"""Weights quantised by bitsandbytes itself, on the CPU; `test_quantised` has stand-ins."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import MethodError, ModelError
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import TINY_FAMILIES, draw_weights, tiny_model, tiny_tokenizer
from patchsweep.models.weights import tensor_digest
from subjects import CLEAN, CORRUPTED
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from transformers import BitsAndBytesConfig  # noqa: E402

SITES = ["z", "mlp_out", "resid_pre"]
# the hooks run other batches than the packed runner, so products sum in another order: effects are
# of order 1, and fp32 rounding passes three blocks whose weights are of scale 3
TOLERANCE = 1e-4
FOUR_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR_BITS, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {**FOUR_BITS, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR_BITS, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def wide(family: str = "llama") -> PreTrainedModel:
    """A tiny model of 64 columns: bitsandbytes packs 64 weights with one scale."""
    kind, sizes = TINY_FAMILIES[family]
    widths = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "n_embd": 64}
    sizes = {key: widths.get(key, value) for key, value in sizes.items()}
    config = AutoConfig.for_model(kind, **sizes, vocab_size=len(tiny_tokenizer()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw_weights(model, 0)
    return model.eval()


def quantised(folder: Path, family: str = "llama", **settings: Any) -> PreTrainedModel:
    wide(family).save_pretrained(folder / "plain")
    return AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        quantization_config=BitsAndBytesConfig(**settings),
        device_map="cpu",
        dtype=torch.float32,
        attn_implementation="eager",
    )


def pairs(bridge: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )


@cache
def dequantised(kind: str, folder: Path) -> PreTrainedModel:
    """The plain model, with the weights that the packed ones stand for."""
    plain, packed = wide(), quantised(folder, **SETTINGS[kind])
    for name, layer in packed.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("kind", SETTINGS)
def test_quantised_weights_are_swept_as_their_hooks_say(kind: str, tmp_path: Path) -> None:
    model = quantised(tmp_path, **SETTINGS[kind])
    model.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    bridge = ps.load_model(str(tmp_path / "packed"), device="cpu")
    layer = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    assert sum(isinstance(module, layer) for module in bridge.original_model.modules()) == 21
    found = ps.sweep(bridge, pairs(bridge), SITES)
    assert "passes the self-test" in str(found.attrs["provenance"])
    hooked = ps.sweep(bridge, pairs(bridge), SITES, runner="hooked")
    for site in SITES:
        assert float(hooked[site].max() - hooked[site].min()) > 0.1
        np.testing.assert_allclose(found[site], hooked[site], atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_attributed_as_the_weights_that_they_stand_for(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    packed = as_bridge("packed", quantised(tmp_path, **SETTINGS[kind]), tokenizer)
    plain = as_bridge("plain", dequantised(kind, tmp_path / "again"), tokenizer)
    method = ["exact", "atp", "relp"]
    found, expected = (ps.sweep(m, pairs(m), "z", method=method) for m in (packed, plain))
    for name in ("z", "z_atp", "z_relp"):
        assert np.ptp(expected[name].values) > 0.1
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, err_msg=name)


def test_weights_that_a_forward_pass_repacked_have_exact_values_alone(tmp_path: Path) -> None:
    model = quantised(tmp_path, **SETTINGS["nf4"])
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 alone")
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    bridge = as_bridge("packed", model, tiny_tokenizer())
    ps.sweep(bridge, pairs(bridge), "z", layers=[2])
    with pytest.raises(MethodError, match=r"Linear4bit.*no gradient.*by load_model before it runs"):
        ps.sweep(bridge, pairs(bridge), "z", method="atp")


def test_gradients_of_int8_are_those_of_the_plain_weights_but_for_rounding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    packed = as_bridge("int8", quantised(tmp_path, **SETTINGS["int8"]), tokenizer)
    plain = as_bridge("plain", wide(), tokenizer)
    found, expected = (ps.sweep(m, pairs(m), "z", method="atp") for m in (packed, plain))
    ours, theirs = found["z_atp"].values.ravel(), expected["z_atp"].values.ravel()
    effect = [x - x[0] for x in (ours, theirs)]
    assert np.corrcoef(*effect)[0, 1] > 0.9


def test_int8_with_outliers_is_refused_when_its_bridge_differs(tmp_path: Path) -> None:
    model = quantised(tmp_path, load_in_8bit=True, llm_int8_threshold=1.0)
    with pytest.raises(ModelError, match=r"Linear8bitLt.*over all rows.*llm_int8_threshold=0"):
        as_bridge("int8", model, tiny_tokenizer())


def test_one_quantised_matrix_of_q_k_and_v_is_refused(tmp_path: Path) -> None:
    model = quantised(tmp_path, "gpt2", **SETTINGS["nf4"])
    with pytest.raises(ModelError, match=r"cannot split a fused QKV.*load gpt2 without quantis"):
        as_bridge("gpt2", model, tiny_tokenizer())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "GPTQ.*optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "AWQ.*gptqmodel"),
        ({"quant_method": "fbgemm_fp8"}, "fp8.*requires a GPU"),
    ],
    ids=lambda x: x["quant_method"] if isinstance(x, dict) else "",
)
def test_what_transformers_cannot_load_here_is_told(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=rf"quantised weights of .* need .*{words}"):
        ps.load_model(str(tmp_path), device="cpu")


def test_weights_that_have_no_bytes_are_told() -> None:
    class Strange(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            raise NotImplementedError(func)

        def detach(self) -> Any:
            return self

        cpu = contiguous = detach

    with pytest.raises(ModelError, match=r"class Strange cannot be read as bytes"):
        tensor_digest(torch.zeros(2, 2).as_subclass(Strange))
