"""The package stands alone: no engine, and no Triton where nothing needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import patchsweep_kernels

_PROGRAM = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it is not installed
import torch
from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.attention import Rows, prefix_attention
from patchsweep_kernels.attribution import attribution_dot
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.scatter import scatter_patch
from patchsweep_kernels.tokens import Tokens
from patchsweep_kernels.unembedding import FinalNorm, Unembedding
from patchsweep_kernels.vocab import vocab_kl

x = torch.ones(2, 4)
scatter_patch(x, torch.zeros(1, 4), torch.tensor([1]))
assert x.sum() == 4
assert attribution_dot(x, x + 1, x).tolist() == [-4, 0]
unembedding = Unembedding(torch.eye(4))
assert vocab_kl(x, x, unembedding).abs().max() < 1e-6
answer_logits(x, unembedding, torch.tensor([[0], [1]]), norm=FinalNorm("rms", 1e-6))
rows = Rows(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]))
z = torch.ones(1, 1, 4)
assert torch.equal(prefix_attention(z, z, z, z[None], z[None], rows, scale=1.0), z)
zero = torch.tensor([0])
tokens = Tokens(zero, zero, zero)
assert torch.equal(replaced_attention(z, tokens, z, z, tokens, z[None], z[None], scale=1.0), z)
base = (z[None], z[None], z[None], z[None, None])
assert not attention_change(*base, z, z, tokens, 1, scale=1.0)[0].any()
strangers = {name.split(".")[0] for name in sys.modules} & {"patchsweep", "transformers", "triton"}
assert strangers == {"triton"}, strangers
print("stands alone")
"""


def test_references_run_without_triton_and_without_the_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "stands alone", done.stderr


def test_no_file_asks_for_the_device_but_dispatch() -> None:
    package = Path(patchsweep_kernels.__file__).parent
    askers = [
        path.name
        for path in package.glob("*.py")
        if "is_cuda" in path.read_text() or "import triton" in path.read_text()
    ]
    assert askers == ["dispatch.py"]
