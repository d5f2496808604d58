"""Shared fixtures: models are loaded once."""

from __future__ import annotations

import pytest
from subjects import model
from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    return model("smollm2-135m")


@pytest.fixture(scope="session")
def llama() -> TransformerBridge:
    return model("tiny:llama")
