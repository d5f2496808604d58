"""Compiles the programs and writes their weights to tests/data/known_circuits.

    pip install tracr-pypi safetensors      # in an environment of its own: it brings jax
    python -m tools.known_circuits.compile [NAME ...]

One safetensors file a program: the compiled matrices, of which most entries are zero, as flat
indices and values; in the metadata their shapes, the names of the residual stream's directions, the
vocabulary, and what the compiled model answers on a few prompts.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling

from tools.known_circuits.programs import PROGRAMS, Program

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "data" / "known_circuits"
LENGTH = 5  # tokens of a prompt, without the start token
BOS, PAD = "BOS", "PAD"


def compiled(made: Any, program: Program) -> Any:
    """Return Tracr's model."""
    return compiling.compile_rasp_to_model(
        made,
        vocab=set(program.vocab),
        max_seq_len=LENGTH,
        causal=True,
        compiler_bos=BOS,
        compiler_pad=PAD,
    )


def write(name: str, program: Program) -> int:
    """Compile one program and write its file; return the file's size in bytes."""
    made = program.make()
    model = compiled(made, program)
    labels = list(model.residual_labels)
    categorical = hasattr(model.output_encoder, "encoding_map")
    names, directions = ["value"], [made.label]
    if categorical:
        order = sorted(model.output_encoder.encoding_map.items(), key=lambda item: item[1])
        names = [str(value) for value, _ in order]
        directions = [f"{directions[0]}:{value}" for value, _ in order]
    unembed = np.zeros((len(labels), len(names)), np.float32)
    unembed[[labels.index(direction) for direction in directions], range(len(names))] = 1
    arrays = {"unembed": unembed}
    for module, parameters in model.params.items():
        for kind, value in parameters.items():
            arrays[f"{module}/{kind}"] = np.asarray(value)
    rng = random.Random(name)
    prompts = [[rng.choice(program.vocab) for _ in range(LENGTH)] for _ in range(8)]
    encoder = model.input_encoder
    final = []
    for prompt in prompts:
        found = model.apply([BOS, *prompt])
        final.append((np.asarray(found.transformer_output)[0] @ unembed).tolist())
    config = model.model_config
    metadata = {
        "program": name,
        "copies": program.copies,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "key_size": config.key_size,
        "labels": labels,
        "inputs": {str(key): int(value) for key, value in encoder.encoding_map.items()},
        "outputs": names,
        "vocab": [str(token) for token in program.vocab],
        "shapes": {key: list(value.shape) for key, value in arrays.items()},
        "prompts": [[str(token) for token in prompt] for prompt in prompts],
        "answers": final,
    }
    sparse: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        flat = value.astype(np.float32).ravel()
        at = np.flatnonzero(flat)
        sparse[f"{key}:at"] = at.astype(np.int32)
        sparse[f"{key}:value"] = flat[at]
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{name}.safetensors"
    save_file(sparse, file, metadata={"known_circuit": json.dumps(metadata)})
    return file.stat().st_size


def main(names: list[str]) -> None:
    """Compile the programs called `names`; all of them by default."""
    for name in names or PROGRAMS:
        print(f"{name}: {write(name, PROGRAMS[name]):,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
