"""In the last block only tokens that are read pass the MLP; what is patched there still counts."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
from plain import logit_diff, pairs_for, plain_and_bridge
from torch import Tensor

VALUE = 0.4
# after these the block adds to its input: what they give is attn_out
ATTENTION_OUT = {
    "Olmo2ForCausalLM": "post_attention_layernorm",
    "Exaone4ForCausalLM": "post_attention_layernorm",
    "LlamaForCausalLM": "self_attn",
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("architecture", ATTENTION_OUT)
def test_resid_mid_equals_plain_hooks(architecture: str, layer: int) -> None:
    """OLMo 2 and EXAONE 4 have norms after the sublayers alone: the MLP reads resid_mid itself."""
    plain, bridge = plain_and_bridge(architecture)
    pairs = pairs_for(bridge)
    block = plain.model.layers[layer]
    length = len(pairs[0])

    def patched(positions: slice) -> float:
        entering: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            entering.append(x.clone())
            return x

        def fill(out: Tensor) -> Tensor:  # the stream is what entered and this
            out[:, positions] = VALUE - entering[0][:, positions]
            return out

        patches = [(block, "in", keep), (getattr(block, ATTENTION_OUT[architecture]), "out", fill)]
        return logit_diff(plain, pairs[0].clean, *pairs[0].answer, *pairs[0].wrong_answer, patches)

    arguments = {"intervention": VALUE, "layers": [layer], "runner": "packed"}
    whole = ps.sweep(bridge, pairs, "resid_mid", positions="all", **arguments)
    cells = ps.sweep(bridge, pairs, "resid_mid", positions=[length - 3, length - 1], **arguments)
    expected = [patched(slice(p, p + 1)) for p in (length - 3, length - 1)]
    np.testing.assert_allclose(cells.resid_mid.values.ravel(), expected, atol=1e-4)
    assert whole.resid_mid.item() == pytest.approx(patched(slice(None)), abs=1e-4)
    assert abs(expected[1] - cells.base_metric.item()) > 0.2
