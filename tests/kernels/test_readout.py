"""Answer logits and sums over the vocabulary equal the same formulas on full fp64 logits."""

from __future__ import annotations

from typing import Any, Literal

import naive
import pytest
import torch
from naive import DTYPES, refused
from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.unembedding import FinalNorm, Unembedding
from patchsweep_kernels.vocab import log_z, target_log_prob, total_variation, vocab_kl
from torch import Tensor

# Logits reach about 3 * sqrt(d) = 35, and fp32 keeps 35 to 4e-6; sums of d products add some more.
LOGIT_ATOL = 5e-5

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"softcap": 3.0, "scale": 0.5},
    "all": {"bias": True, "softcap": 5.0, "scale": 0.25},
}


def _unembedding(d_vocab: int, d: int, dtype: torch.dtype, head: str) -> Unembedding:
    settings = dict(HEADS[head])
    if settings.pop("bias", False):
        settings["bias"] = torch.randn(d_vocab).to(dtype)
    return Unembedding(naive.padded(torch.randn(d_vocab, d).to(dtype)), **settings)


def _close(out: Tensor, expected: Tensor, atol: float = LOGIT_ATOL) -> None:
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["none", "rms", "layer", "gemma"])
def test_answer_logits_equal_full_logits(kind: str, head: str, dtype: torch.dtype) -> None:
    n_rows, d, d_vocab = 7, 63, 29
    unembedding = _unembedding(d_vocab, d, dtype, head)
    resid = naive.padded(torch.randn(n_rows, d).to(dtype) + 2)
    norms = {
        "none": None,
        "rms": FinalNorm("rms", 1e-6, torch.randn(d).to(dtype)),
        "layer": FinalNorm("layer", 1e-5, torch.randn(d).to(dtype), torch.randn(d).to(dtype)),
        "gemma": FinalNorm("rms", 1e-6, torch.randn(d).to(dtype), offset=1.0),
    }
    tokens = torch.randint(0, d_vocab, (n_rows, 3))
    out = answer_logits(resid, unembedding, tokens, norm=norms[kind])
    assert out.dtype == torch.float32
    _close(out, naive.logits(naive.normed(resid, norms[kind]), unembedding).gather(1, tokens))


@pytest.mark.parametrize(("n_rows", "d", "n_answers"), [(1, 1, 1), (37, 123, 2), (2, 1030, 5)])
def test_answer_logits_of_odd_sizes(n_rows: int, d: int, n_answers: int) -> None:
    unembedding = _unembedding(11, d, torch.float32, "plain")
    resid, tokens = torch.randn(n_rows, d), torch.randint(0, 11, (n_rows, n_answers))
    norm = FinalNorm("layer", 1e-5)
    out = answer_logits(resid, unembedding, tokens, norm=norm)
    _close(out, naive.logits(naive.normed(resid, norm), unembedding).gather(1, tokens), atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("n_rows", "d", "d_vocab"), [(1, 63, 37), (37, 123, 333), (5, 16, 1)], ids=lambda n: str(n)
)
def test_vocabulary_sums_equal_full_logits(
    n_rows: int, d: int, d_vocab: int, head: str, dtype: torch.dtype
) -> None:
    unembedding = _unembedding(d_vocab, d, dtype, head)
    base, patched = torch.randn(2, d).to(dtype), naive.padded(torch.randn(n_rows, d).to(dtype))
    base_row = torch.randint(0, 2, (n_rows,))
    a, b = (naive.logits(x, unembedding) for x in (base[base_row], patched))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    tokens = torch.randint(0, d_vocab, (n_rows, 3))
    _close(log_z(patched, unembedding), b.logsumexp(-1))
    _close(target_log_prob(patched, unembedding, tokens), log_q.gather(1, tokens))
    kl = vocab_kl(base, patched, unembedding, base_row=base_row)
    _close(kl, (log_p.exp() * (log_p - log_q)).sum(-1), atol=2 * LOGIT_ATOL)
    distance = total_variation(base, patched, unembedding, base_row=base_row)
    _close(distance, (log_p.exp() - log_q.exp()).abs().sum(-1) / 2, atol=1e-5)


def test_vocabulary_sums_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsweep_kernels.vocab._BLOCK_BYTES", 4 * 64 * 5)
    monkeypatch.setattr("patchsweep_kernels.vocab._BLOCK_ROWS", 5)
    monkeypatch.setattr("patchsweep_kernels.vocab._PROGRAMS", 2)
    unembedding = _unembedding(333, 16, torch.float32, "all")
    base, patched = torch.randn(12, 16), torch.randn(12, 16)
    log_p, log_q = (naive.logits(x, unembedding).log_softmax(-1) for x in (base, patched))
    _close(vocab_kl(base, patched, unembedding), (log_p.exp() * (log_p - log_q)).sum(-1))
    distance = total_variation(base, patched, unembedding)
    _close(distance, (log_p.exp() - log_q.exp()).abs().sum(-1) / 2, atol=1e-5)
    _close(log_z(base, unembedding), naive.logits(base, unembedding).logsumexp(-1))


def test_kl_of_equal_states_is_zero() -> None:
    unembedding = _unembedding(333, 64, torch.float32, "plain")
    state = torch.randn(5, 64)
    # Exactly equal logits: what is left is the rounding of the two sums, which are equal as well.
    assert vocab_kl(state, state.clone(), unembedding).abs().max() <= 1e-6
    assert total_variation(state, state.clone(), unembedding).abs().max() == 0.0


def test_sums_survive_logits_far_apart() -> None:
    unembedding = Unembedding(torch.eye(80) * 400.0)
    base, patched = torch.eye(80)[:3], torch.eye(80)[1:4]
    expected = torch.full((3,), 400.0, dtype=torch.float64)
    _close(vocab_kl(base, patched, unembedding), expected)
    _close(total_variation(base, patched, unembedding), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("function", [vocab_kl, total_variation])
def test_sums_of_no_rows(function: Any) -> None:
    unembedding = _unembedding(9, 16, torch.float32, "plain")
    none = torch.empty(0, 16)
    assert function(none, none, unembedding).shape == (0,)
    assert log_z(none, unembedding).shape == (0,)
    assert answer_logits(none, unembedding, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)


_U = Unembedding(torch.zeros(9, 8))


@pytest.mark.parametrize(
    ("message", "function", "arguments"),
    [
        ("tokens holds 9", answer_logits, {"tokens": torch.tensor([[9]])}),
        ("tokens must be int64", answer_logits, {"tokens": torch.tensor([[1.0]])}),
        (r"tokens must be \[1, answer\]", answer_logits, {"tokens": torch.tensor([1])}),
        (r"resid must be \[row, 8\]", answer_logits, {"resid": torch.zeros(1, 7)}),
        ("unembedding.w_u is torch.float32", answer_logits, {"resid": torch.zeros(1, 8).half()}),
        ("unembedding.w_u is on cpu", answer_logits, {"resid": torch.zeros(1, 8, device="meta")}),
        (
            "resid must be contiguous along d",
            answer_logits,
            {"resid": torch.zeros(8, 2).T[:1]},
        ),
        (
            "norm.weight must have shape",
            answer_logits,
            {"norm": FinalNorm("rms", 1e-6, torch.zeros(7))},
        ),
        (
            "norm.bias is torch.float16",
            answer_logits,
            {"norm": FinalNorm("layer", 1e-6, torch.zeros(8), torch.zeros(8).half())},
        ),
        ("base has 2 rows", vocab_kl, {"base": torch.zeros(2, 8)}),
        ("base_row holds 1", vocab_kl, {"base_row": torch.tensor([1])}),
        ("base_row must have 1 entries", total_variation, {"base_row": torch.tensor([0, 0])}),
        ("patched must be", vocab_kl, {"patched": torch.zeros(1, 8, 1)}),
        (r"final must be \[row, 8\]", log_z, {"final": torch.zeros(1, 3)}),
    ],
)
def test_readout_refuses(message: str, function: Any, arguments: dict[str, Any]) -> None:
    row = torch.zeros(1, 8)
    given: dict[Any, dict[str, Any]] = {
        answer_logits: {"resid": row, "tokens": torch.tensor([[0]])},
        log_z: {"final": row},
        vocab_kl: {"base": row, "patched": row},
        total_variation: {"base": row, "patched": row},
    }
    with refused(message):
        function(**given[function] | {"unembedding": _U} | arguments)


@pytest.mark.parametrize(
    ("message", "w_u", "settings"),
    [
        ("w_u must be", torch.zeros(8, 9).T, {}),
        ("bias must have shape", torch.zeros(9, 8), {"bias": torch.zeros(8)}),
        ("bias is torch.float16", torch.zeros(9, 8), {"bias": torch.zeros(9).half()}),
        ("softcap must be positive", torch.zeros(9, 8), {"softcap": -1.0}),
    ],
)
def test_unembedding_refuses(message: str, w_u: Tensor, settings: dict[str, Any]) -> None:
    with refused(message):
        Unembedding(w_u, **settings)


def test_norm_refuses_an_unknown_kind() -> None:
    kind: Literal["rms"] = "batch"  # type: ignore[assignment]
    with refused("kind must be"):
        FinalNorm(kind, 1e-5)
