"""Trains three small sparse autoencoders on SmolLM2-135M, for `ps.latents`.

    python examples/train_dictionaries.py runs/dictionaries

Top-k autoencoders of 4,096 latents, 32 of them active on a token, on the residual stream behind
blocks 9, 15 and 21. The text is what the built-in tasks make: some 7,000 tokens of a few kinds of
sentence. So they are dictionaries of these prompts, not of English; they show how latents are
patched, on real activations, within minutes on two cores. They are written in the layout of
SAELens; `ps.Dictionary.from_safetensors(folder)` reads them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import patchsweep as ps
import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS = (9, 15, 21)
TASKS = ("ioi", "facts", "greater_than", "docstring", "pronouns", "sva", "addition", "induction")
N_PAIRS = 20  # of each task; both prompts of a pair are read
N_LATENTS = 4096
K = 32
STEPS, BATCH, RATE = 100, 512, 1e-3


@torch.no_grad()
def activations(model) -> dict[int, Tensor]:
    """Return layer -> residual streams `[token, d_model]`, in an order drawn at random.

    The first token of a prompt is left out: its activations are some hundred times larger than
    those of others, and the same in every prompt.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda x, hook, layer=layer: kept[layer].append(x))
        for layer in LAYERS
    ]
    for task in TASKS:
        prompts = {t for p in ps.load_task(model, task, N_PAIRS) for t in (p.clean, p.corrupted)}
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = torch.tensor(sorted(prompt for prompt in prompts if len(prompt) == length))
            for part in rows.split(16):
                model.run_with_hooks(part, fwd_hooks=hooks, stop_at_layer=LAYERS[-1] + 1)
    order = None
    found = {}
    for layer, parts in kept.items():
        tokens = torch.cat([x[:, 1:].flatten(0, 1) for x in parts])
        if order is None:
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        found[layer] = tokens[order]
    return found


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Return the K largest latents of each token: activations and numbers `[token, K]`."""
    largest = (x @ w_enc + b_enc).topk(K, dim=-1)
    return largest.values.relu(), largest.indices


def decode(latents: Tensor, numbers: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return the sum of the latents' decoder rows `[token, d_model]`."""
    rows = torch.nn.functional.embedding_bag(numbers, w_dec, per_sample_weights=latents, mode="sum")
    return rows + b_dec


def train(tokens: Tensor, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return weights of an autoencoder of `tokens`, and how well it does on the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    held_out = len(tokens) // 10
    seen, unseen = tokens[:-held_out], tokens[-held_out:]
    mean = seen.mean(dim=0)
    scale = (seen - mean).pow(2).mean().sqrt()
    x = (seen - mean) / scale
    # decoder rows begin as tokens of the data, and the encoder as their transpose
    rows = torch.randint(len(x), (N_LATENTS,), generator=generator)
    w_dec = x[rows] + 0.1 * torch.randn(N_LATENTS, x.shape[1], generator=generator)
    w_dec = torch.nn.functional.normalize(w_dec, dim=-1).requires_grad_()
    w_enc = w_dec.detach().T.clone().contiguous().requires_grad_()
    b_enc = torch.zeros(N_LATENTS, requires_grad=True)
    with torch.no_grad():  # rows are alike, so their sum is too long: the best length of it
        sums = decode(*encode(x[:BATCH], w_enc, b_enc), w_dec, torch.zeros(x.shape[1]))
        w_enc *= (x[:BATCH] * sums).sum() / sums.pow(2).sum()
    b_dec = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([w_enc, w_dec, b_enc, b_dec], lr=RATE)
    loss = torch.zeros(())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 4 * (STEPS - step) / STEPS)
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        latents = encode(batch - b_dec.detach(), w_enc, b_enc)
        loss = (decode(*latents, w_dec, b_dec) - batch).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        y = (unseen - mean) / scale
        latents, numbers = encode(y - b_dec, w_enc, b_enc)
        error = (decode(latents, numbers, w_dec, b_dec) - y).pow(2).sum()
        _, every = encode(x - b_dec, w_enc, b_enc)
        spread = (y - y.mean(dim=0)).pow(2).sum()
        told = {
            "loss": float(loss),  # of the last batch; variance is 1
            "explained_variance": float(1 - error / spread),  # of tokens not trained on
            "active": float((latents > 0).sum(dim=-1).float().mean()),
            "used": len(every.unique()) / N_LATENTS,  # among the K largest of some token
        }
        weights = {  # in the units of the model
            "W_enc": w_enc / scale,
            "b_enc": b_enc,
            "W_dec": w_dec * scale,
            "b_dec": mean + scale * b_dec,
        }
    return {name: w.detach().contiguous() for name, w in weights.items()}, told


def main(folder: Path) -> None:
    """Train the autoencoders and write them to `folder`, one folder each."""
    begun = time.perf_counter()
    model = ps.load_model("smollm2-135m")
    tokens = activations(model)
    n = len(tokens[LAYERS[0]])
    print(f"{n:,} tokens of {len(TASKS)} tasks: {time.perf_counter() - begun:.0f} s", flush=True)
    for seed, layer in enumerate(LAYERS):
        begun = time.perf_counter()
        weights, told = train(tokens[layer], seed)
        place = folder / f"resid_post.{layer}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / "sae_weights.safetensors")
        config = {
            "architecture": "topk",
            "k": K,
            "d_in": weights["W_enc"].shape[0],
            "d_sae": N_LATENTS,
            "dtype": "float32",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "metadata": {
                "model_name": "SmolLM2-135M",
                "hook_name": f"blocks.{layer}.hook_resid_post",
                **told,
            },
        }
        (place / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        words = ", ".join(f"{name} {value:.3f}" for name, value in told.items())
        print(f"{place}: {words}; {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dictionaries"))
