"""Reads compiled programs as GPT-2 models, and derives their true edges from the weights.

The residual stream of a compiled model has a named direction for every value that a program
computes. A component reads the directions on which its weights act, and writes those that its
output has. An edge is true if the sender writes a direction that the reader reads, what is written
there can differ between prompts, and the reader's own component leads on to the output. What the
embeddings carry is their differences: a reader that reads every token alike has no edge from them.
Nothing is patched to find that out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "data" / "known_circuits"
# a norm that divides by sqrt(variance + EPS) and multiplies by sqrt(EPS) leaves vectors of order
# one as they are, to 1e-9 of their size, if their mean is zero
EPS = 1e10
POSITIONS = 64  # more than the program has: checks of a loaded model run longer prompts
VOCABULARY = 256  # likewise: random prompts of a few of a program's tokens would all be alike
TINY = 1e-6

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Compiled:
    """One compiled program."""

    name: str
    about: dict[str, Any]  # metadata of its file
    arrays: dict[str, Floats]

    @cached_property
    def width(self) -> int:
        """Number of directions of the residual stream."""
        return len(self.about["labels"])

    def heads(self, layer: int, kind: str) -> Floats:
        """Return a projection `[head, direction, key_size]` (linear: `[head, key_size, d]`)."""
        n, size = self.about["n_heads"], self.about["key_size"]
        weight = self.arrays.get(f"transformer/layer_{layer}/attn/{kind}/w")
        if weight is None:  # a layer without attention
            return np.zeros(
                (n, size, self.width) if kind == "linear" else (n, self.width, size), np.float32
            )
        if kind == "linear":
            return weight.reshape(n, size, self.width)
        return weight.reshape(self.width, n, size).transpose(1, 0, 2)

    def mlp(self, layer: int, which: int, kind: str) -> Floats | None:
        """Return `w` or `b` of the MLP's first or second map; None: the layer has no MLP."""
        return self.arrays.get(f"transformer/layer_{layer}/mlp/linear_{which}/{kind}")


def names() -> list[str]:
    """Return the programs that are compiled."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def read(name: str) -> Compiled:
    """Read the file of a program."""
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        about = json.loads(file.metadata()["known_circuit"])
        arrays = {}
        for key, shape in about["shapes"].items():
            flat = np.zeros(int(np.prod(shape)), np.float32)
            flat[file.get_tensor(f"{key}:at")] = file.get_tensor(f"{key}:value")
            arrays[key] = flat.reshape(shape)
    return Compiled(name, about, arrays)


# --- what is true ---


def true_edges(of: Compiled) -> set[tuple[str, str]]:
    """Return the true edges (sender, reader), by this package's names."""
    reads, writes = _reads(of), _writes(of)
    order = [
        name
        for layer in range(of.about["n_layers"])
        for name in (*(f"a{layer}.h{h}" for h in range(of.about["n_heads"])), f"m{layer}")
    ]
    nothing = np.zeros((0, of.width), np.float32)
    carried = {"embed": _embedded(of)}  # what each component writes that can differ, [any, d]

    def reaches(sender: str, reader: str) -> bool:
        moved = carried[sender] @ reads[reader]
        return _before(sender, reader) and bool(np.abs(moved).max(initial=0) > TINY)

    for name in order:
        differs = any(reaches(sender, r) for r in _readers(name) for sender in carried)
        carried[name] = np.eye(of.width, dtype=np.float32)[writes[name]] if differs else nothing
    edges: set[tuple[str, str]] = set()
    needed = {"logits"}
    for name in reversed(["embed", *order]):
        found = {(name, reader) for reader in needed if reaches(name, reader)}
        if found:
            edges |= found
            needed |= set(_readers(name)) if name != "embed" else set()
    return edges


def _readers(node: str) -> list[str]:
    return [node] if node.startswith("m") else [f"{node}.{kind}" for kind in "qkv"]


def _place(name: str) -> tuple[int, int]:
    """Return (layer, 0 for attention and 1 for the MLP); embed comes first and logits last."""
    if name == "embed":
        return (-1, 0)
    if name == "logits":
        return (10**6, 0)
    return int(name[1:].partition(".")[0]), int(name.startswith("m"))


def _before(sender: str, reader: str) -> bool:
    return _place(sender) < _place(reader)


def _embedded(of: Compiled) -> Floats:
    """Return the differences between the embeddings of the vocabulary's tokens, `[token, d]`."""
    ids = [of.about["inputs"][token] for token in of.about["vocab"]]
    rows = of.arrays["token_embed/embeddings"][ids]
    found: Floats = rows - rows[:1]
    return found


def _reads(of: Compiled) -> dict[str, Floats]:
    """Return per reader the matrix `[d, any]` through which it depends on its stream."""
    found = {"logits": of.arrays["unembed"]}
    for layer in range(of.about["n_layers"]):
        q, k, v, o = (of.heads(layer, kind) for kind in ("query", "key", "value", "linear"))
        for h in range(of.about["n_heads"]):
            # what the scores and the output depend on, whatever the way through the head's space
            scores, moved = q[h] @ k[h].T, v[h] @ o[h]
            found[f"a{layer}.h{h}.q"] = scores
            found[f"a{layer}.h{h}.k"] = scores.T
            found[f"a{layer}.h{h}.v"] = moved
        first = of.mlp(layer, 1, "w")
        found[f"m{layer}"] = np.zeros((of.width, 1), np.float32) if first is None else first
    return found


def _writes(of: Compiled) -> dict[str, Bools]:
    found = {}
    for layer in range(of.about["n_layers"]):
        v, o = of.heads(layer, "value"), of.heads(layer, "linear")
        for h in range(of.about["n_heads"]):
            found[f"a{layer}.h{h}"] = _any(v[h] @ o[h], axis=0)
        second = of.mlp(layer, 2, "w")
        found[f"m{layer}"] = np.zeros(of.width, bool) if second is None else _any(second, axis=0)
    return found


def _any(x: Floats, axis: int | None) -> Bools:
    found: Bools = np.abs(x).max(axis=axis, initial=0) > TINY
    return found


# --- the model ---


def save_gpt2(of: Compiled, folder: Path) -> Path:
    """Write a folder that `patchsweep.load_model` loads: a GPT-2 that computes the program.

    One direction is added to the stream, in which every component writes minus the sum of what it
    writes elsewhere, so that the mean over directions is zero and a LayerNorm subtracts nothing.
    Outputs have tokens of their own, called =NAME. The logits of input tokens read their
    embeddings, so that no prompt has equal logits only; further tokens are copies of the program's.
    Neither enters a metric of outputs.
    """
    n_heads, size = of.about["n_heads"], of.about["key_size"]
    d = of.width
    head = max(size, -(-(d + 1) // n_heads))
    wide = n_heads * head
    inner = max(
        (w.shape[1] for i in range(of.about["n_layers"]) if (w := of.mlp(i, 1, "w")) is not None),
        default=1,
    )
    outputs = [f"={name}" for name in of.about["outputs"]]
    if len(outputs) == 1:  # a number: its logit beside one that is always 0
        outputs.append("=zero")
    words = [*sorted(of.about["inputs"], key=of.about["inputs"].get), *outputs]
    words += [f"other{i}" for i in range(VOCABULARY - len(words))]
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=POSITIONS,
        n_embd=wide,
        n_layer=of.about["n_layers"],
        n_head=n_heads,
        n_inner=inner,
        activation_function="relu",
        layer_norm_epsilon=EPS,
        tie_word_embeddings=False,
        bos_token_id=of.about["inputs"]["BOS"],
        eos_token_id=of.about["inputs"]["PAD"],
    )
    model = GPT2LMHeadModel(config).eval()
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    for name in state:
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            state[name].fill_(EPS**0.5)

    def written(x: Floats) -> torch.Tensor:  # [..., d] -> [..., wide], of mean 0
        out = torch.zeros(*x.shape[:-1], wide)
        out[..., :d] = torch.from_numpy(x)
        out[..., d] = -torch.from_numpy(x).sum(-1)
        return out

    tokens = written(of.arrays["token_embed/embeddings"])
    state["transformer.wte.weight"][: len(tokens)] = tokens
    own = [of.about["inputs"][token] for token in of.about["vocab"]]
    rest = torch.tensor(own).repeat(VOCABULARY)[: VOCABULARY - len(tokens)]
    state["transformer.wte.weight"][len(tokens) :] = tokens[rest]
    positions = written(of.arrays["pos_embed/embeddings"])
    state["transformer.wpe.weight"][: len(positions)] = positions
    for layer in range(of.about["n_layers"]):
        block = f"transformer.h.{layer}."
        for i, kind in enumerate(("query", "key", "value")):
            weight = torch.from_numpy(of.heads(layer, kind).copy())
            if kind == "query":  # GPT-2 divides scores by another root
                weight = weight * (head / size) ** 0.5
            bias = of.arrays.get(f"transformer/layer_{layer}/attn/{kind}/b")
            for h in range(n_heads):
                columns = slice(i * wide + h * head, i * wide + h * head + size)
                state[f"{block}attn.c_attn.weight"][:d, columns] = weight[h]
                if bias is not None:
                    state[f"{block}attn.c_attn.bias"][columns] = torch.from_numpy(
                        bias[h * size : (h + 1) * size].copy()
                    )
        output = of.heads(layer, "linear")
        for h in range(n_heads):
            rows = slice(h * head, h * head + size)
            state[f"{block}attn.c_proj.weight"][rows] = written(output[h])
        bias = of.arrays.get(f"transformer/layer_{layer}/attn/linear/b")
        if bias is not None:
            state[f"{block}attn.c_proj.bias"][:] = written(bias)
        first = of.mlp(layer, 1, "w")
        if first is not None:
            hidden = first.shape[1]
            state[f"{block}mlp.c_fc.weight"][:d, :hidden] = torch.from_numpy(first)
            state[f"{block}mlp.c_fc.bias"][:hidden] = torch.from_numpy(of.mlp(layer, 1, "b"))
            state[f"{block}mlp.c_proj.weight"][:hidden] = written(of.mlp(layer, 2, "w"))
            state[f"{block}mlp.c_proj.bias"][:] = written(of.mlp(layer, 2, "b"))
    n_out = len(of.about["outputs"])
    first_output = len(of.about["inputs"])
    state["lm_head.weight"][first_output : first_output + n_out, :d] = torch.from_numpy(
        of.arrays["unembed"].T.copy()
    )
    state["lm_head.weight"][:first_output, :d] = torch.from_numpy(
        of.arrays["token_embed/embeddings"].copy()
    )
    model.load_state_dict(state)
    model.save_pretrained(folder)
    _tokenizer(words).save_pretrained(folder)
    return folder


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="PAD"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = TemplateProcessing(
        single="BOS $A", special_tokens=[("BOS", vocab["BOS"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="BOS", eos_token="PAD", pad_token="PAD"
    )
