"""The digest of all weights: every byte counts, wherever it lies and however it was edited."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import StoreError
from patchsweep.models import weights
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import tiny_model
from patchsweep.models.weights import checksum, known_digest, weights_digest, weights_stamp
from patchsweep.sweeps.identity import model_identity
from subjects import demo_pairs, model
from torch import Tensor, nn


def all_tensors(plain: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from plain.named_parameters()
    yield from plain.named_buffers()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_every_element_of_every_weight_counts(family: str) -> None:
    plain = ps.load_model(f"tiny:{family}", device="cpu").original_model
    before = weights_digest(plain)
    seen = {before}
    rng = np.random.default_rng(0)
    for name, tensor in all_tensors(plain):
        at = tuple(rng.integers(tensor.shape).tolist())
        kept = tensor.data[at].clone()
        tensor.data[at] += 1
        seen.add(weights_digest(plain))
        tensor.data[at] = kept
        assert weights_digest(plain) == before, name
    assert len(seen) == 1 + len(list(all_tensors(plain)))


def test_bf16_weights_are_hashed_as_they_are() -> None:
    plain = ps.load_model("tiny:llama", device="cpu", dtype="bfloat16").original_model
    before = weights_digest(plain)
    weight = plain.get_input_embeddings().weight.data
    bits = weight.view(torch.int16)
    bits[3, 7] ^= 1  # the last bit
    assert weights_digest(plain) != before
    plain.float()
    assert weights_digest(plain) != before


def test_signed_zeros_and_other_nans_are_other_weights() -> None:
    plain = ps.load_model("tiny:llama", device="cpu").original_model
    weight = plain.get_input_embeddings().weight.data
    found = set()
    for bits in (0, -(2**31), 0x7FC00000, 0x7FC00001):
        weight.view(torch.int32)[0, 0] = bits
        found.add(weights_digest(plain))
    assert len(found) == 4


def _torch(weight: Tensor) -> None:
    with torch.no_grad():
        weight[:, 5] = 0


def _data(weight: Tensor) -> None:
    weight.data[:, 5] = 0


def _numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:, 5] = 0


def _row(weight: Tensor) -> None:
    weight.data[400] = 0


def _element(weight: Tensor) -> None:
    weight.data[3] += 1e-6


def _halve(weight: Tensor) -> None:
    weight.mul_(0.5)


def _swap(weight: Tensor) -> None:
    weight.data[:] = weight.data.roll(1, 0)


DOWN = "layers.1._original_component.mlp._original_component.down_proj"
OUT = "layers.0._original_component.self_attn._original_component.o_proj"
EDITS: dict[str, tuple[str, Callable[[Tensor], None]]] = {
    "mlp-column": (DOWN, _torch),
    "mlp-column-by-data": (DOWN, _data),
    "mlp-column-by-numpy": (
        DOWN,
        _numpy,
    ),
    "heads-swapped": (OUT, _swap),
    "embedding-row": ("embed_tokens", _row),
    "norm": ("layers.2._original_component.input_layernorm", _element),
    "rotary": ("rotary_emb._original_component.inv_freq", _halve),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_weights_are_refused(edit: str, tmp_path: Path) -> None:
    part, change = EDITS[edit]
    bridge = ps.load_model("tiny:llama", device="cpu")
    pairs = demo_pairs("tiny:llama")

    def run() -> None:
        ps.sweep(bridge, pairs, "mlp_out", layers=[0], positions=[15], store=tmp_path / "a.zarr")

    run()
    run()
    change(next(t for name, t in all_tensors(bridge.original_model) if part in name))
    with pytest.raises(StoreError, match="belongs to another run: the weights differ"):
        run()


def test_runs_in_memory_hash_weights_once_until_torch_counts_an_edit() -> None:
    plain = ps.load_model("tiny:llama", device="cpu").original_model
    first = known_digest(plain)
    weight = plain.get_input_embeddings().weight
    weight.data[0, 0] += 1  # not counted
    assert known_digest(plain) == first
    second = weights_digest(plain)
    assert second != first
    assert known_digest(plain) == second
    with torch.no_grad():
        weight[0, 0] += 1
    assert known_digest(plain) not in (first, second)


def test_weights_made_in_inference_mode_are_hashed_each_time() -> None:
    with torch.inference_mode():
        plain, _ = tiny_model("llama")
    assert weights_stamp(plain) is None
    before = known_digest(plain)
    with torch.inference_mode():
        plain.get_input_embeddings().weight[0, 0] += 1
    assert known_digest(plain) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_checksum_notices_edits_and_exchanges(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(7, 5, generator=generator) * 20).to(dtype)
    changed = [weight.clone() for _ in range(4)]
    changed[0][3, 2] += 1
    changed[1][[0, 4]] = changed[1][[4, 0]]
    changed[2][:, [1, 3]] = changed[2][:, [3, 1]]
    changed[3][:, 2] = 0
    found = {checksum(tensor) for tensor in (weight, *changed)}
    assert len(found) == 5
    assert checksum(weight.clone()) == checksum(weight)
    assert checksum(weight[0]) != checksum(weight[1])
    checksum(weight[0, 0])
    checksum(weight[:0])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_that_a_pass_sets_are_no_weights(kind: str) -> None:
    plain, _ = tiny_model("llama")
    rotary = plain.model.rotary_emb
    rotary.rope_type = kind
    before = weights_digest(plain)
    rotary.inv_freq.mul_(2)
    assert weights_digest(plain) == before
    rotary.original_inv_freq.mul_(2)
    assert weights_digest(plain) != before


def test_edited_code_of_a_model_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "my_model_code.py"

    def identity(line: str) -> dict[str, object]:
        file.write_text(
            "from transformers import LlamaForCausalLM\n"
            f"class Mine(LlamaForCausalLM):\n    scale = {line}\n"
        )
        spec = importlib.util.spec_from_file_location("my_model_code", file)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["my_model_code"] = module
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        plain, tokenizer = tiny_model("llama")
        torch.manual_seed(0)
        return model_identity(as_bridge("mine", module.Mine(plain.config), tokenizer))

    first, again, other = identity("1"), identity("1"), identity("2")
    assert first["class"] == "my_model_code.Mine"
    assert first == again
    assert first["code"] != other["code"]
    assert {**first, "code": None} == {**other, "code": None}
    assert model_identity(model("tiny:llama"))["code"] is None


def test_weights_on_disk_are_hashed_once_for_each_state_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in tiny_model("llama"):
        part.save_pretrained(tmp_path)
    in_memory = ps.load_model(str(tmp_path), device="cpu").original_model
    away = ps.load_model(str(tmp_path), device_map={"": "disk"}).original_model
    hashed: list[tuple[int, ...]] = []
    plain = weights._hash

    def count(weight: Tensor, each: Callable[..., Iterator[bytes]]) -> str:
        hashed.append(tuple(weight.shape))
        return plain(weight, each)

    monkeypatch.setattr(weights, "_hash", count)
    first = weights_digest(away)
    assert first == weights_digest(in_memory)
    n_parameters = len(list(away.parameters()))
    hashed.clear()
    assert weights_digest(away) == first
    assert len(hashed) < n_parameters  # buffers, which are in memory
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_digest(away) != first
