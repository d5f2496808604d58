"""A sweep of a model that is far larger than the memory it gets; run as a process of its own.

    python tests/big_model.py FOLDER RESULT [CGROUP_TASKS]

Writes the swept values and what was read to RESULT (.npz). With CGROUP_TASKS, the file of a control
group that takes process ids, the process first joins that group.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

N_LAYERS = 36
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "vocab_size": 1024,
}


def write_model(folder: Path) -> int:
    """A Llama-shaped model with random bf16 weights in shards of four blocks; its bytes."""
    import torch
    from patchsweep.models.tiny import tiny_tokenizer
    from safetensors.torch import save_file
    from transformers import AutoConfig

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model("llama", **CONFIG, **special, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**25, generator=generator).to(torch.bfloat16)

    def draw(*shape: int) -> torch.Tensor:
        """Weights of size 1 / sqrt(fan-in), from a random place of the pool."""
        n = int(torch.tensor(shape).prod())
        first = int(torch.randint(len(pool) - n, (1,), generator=generator))
        return (pool[first : first + n] * shape[-1] ** -0.5).view(shape)

    d, mlp, kv = 2048, 5632, 512
    shards: list[dict[str, torch.Tensor]] = [
        {
            "model.embed_tokens.weight": draw(1024, d) * d**0.5,
            "lm_head.weight": draw(1024, d),
            "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
        }
    ]
    where: dict[str, str] = {}
    n_bytes = 0
    n_shards = 1 + N_LAYERS // 4

    def save(number: int, shard: dict[str, torch.Tensor]) -> int:
        name = f"model-{number + 1:05}-of-{n_shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        return sum(x.numel() * x.element_size() for x in shard.values())

    n_bytes += save(0, shards.pop())
    for number in range(1, n_shards):
        shard = {}
        for layer in range(4 * (number - 1), 4 * number):
            shapes = {
                "self_attn.q_proj": (d, d),
                "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d),
                "self_attn.o_proj": (d, d),
                "mlp.gate_proj": (mlp, d),
                "mlp.up_proj": (mlp, d),
                "mlp.down_proj": (d, mlp),
            }
            block = f"model.layers.{layer}"
            for name, shape in shapes.items():
                shard[f"{block}.{name}.weight"] = draw(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{block}.{name}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        n_bytes += save(number, shard)
    index = {"metadata": {"total_size": n_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return n_bytes


def sweep(folder: Path) -> dict[str, Any]:
    """The swept values, and per pass what was fetched and what came from the disk."""
    import patchsweep as ps
    from patchsweep.runners.packed.runner import PackedRunner
    from subjects import CLEAN, CORRUPTED

    model = ps.load_model(str(folder), dtype="bfloat16", device_map={"": "disk"})
    pairs = ps.PromptPairs.from_strings(model, [CLEAN], [CORRUPTED], [(" Mary", " John")])
    passes: list[tuple[str, int, int, int]] = []

    def counted(name: str, first_block: Any) -> Any:
        inner = getattr(PackedRunner, name)

        def outer(self: PackedRunner, *args: Any) -> Any:
            fetched, read = self.unwrapped.traffic.n_bytes, disk_bytes()
            result = inner(self, *args)
            numbers = (self.unwrapped.traffic.n_bytes - fetched, disk_bytes() - read)
            passes.append((name, first_block(*args), *numbers))
            return result

        return outer

    PackedRunner.load = counted("load", lambda *_: 0)  # type: ignore[method-assign]
    PackedRunner._run_packed_batch = counted(  # type: ignore[method-assign]
        "_run_packed_batch", lambda loaded, packed, given, metrics: int(packed.entry.min())
    )
    watch = Watch()
    # the probe would run the bridge too: it is tried by other tests
    ds = ps.sweep(model, pairs, ["resid_pre", "z"], runner="packed", heads=[0, 31], max_tokens=512)
    return {
        "resid_pre": ds["resid_pre"].values,
        "z": ds["z"].values,
        "first_block": [p[1] for p in passes],
        "is_packed": [p[0] != "load" for p in passes],
        "fetched": [p[2] for p in passes],
        "from_disk": [p[3] for p in passes],
        "peak_anonymous": watch.stop(),
    }


def disk_bytes() -> int:
    """Bytes that this process caused to be read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Watch:
    """The most memory that is no page of a file, looked at a hundred times a second."""

    def __init__(self) -> None:
        self._most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._most = max(self._most, 1024 * int(line.split()[1]))

    def stop(self) -> int:
        """Bytes."""
        self._end.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(str(os.getpid()))
    import numpy as np

    np.savez(sys.argv[2], **sweep(Path(sys.argv[1])))
