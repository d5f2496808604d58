"""Shared fixtures: models are loaded once. Shapes in signatures are checked while tests run."""

from __future__ import annotations

import pytest
from jaxtyping import install_import_hook

CHECKED = ("waves", "metrics", "batch", "hooked", "planner", "exact")
install_import_hook([f"patchsweep.{module}" for module in CHECKED], "beartype.beartype")

from subjects import model  # noqa: E402  # the hook must come first
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    return model("smollm2-135m")


@pytest.fixture(scope="session")
def llama() -> TransformerBridge:
    return model("tiny:llama")
