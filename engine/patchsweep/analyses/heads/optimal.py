"""Optimal ablation: trains for each head the constant that changes predictions least.

A component is replaced by the constant that minimises the expected loss of the ablated model
(Li & Janson 2024, Optimal ablation for interpretability, arXiv:2409.09951). The loss here is
KL(original || ablated) of the next token at the positions read, in nats, averaged over clean
prompts. The constant replaces one head's z at every position of every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import number, whole_number
from patchsweep.attribution.check import check_model
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.forward.grad import GradientModel, Place
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.spec.batch import make_batches
from patchsweep.spec.sites import SITES

Head = tuple[int, int]  # layer, head
# most tokens of one training pass; its graph keeps about 50 KB per token and layer
TRAINING_TOKENS = 1024


@dataclass  # Hydra fills it, which a frozen one does not allow
class OptimalSettings:
    """Settings of training; each head has its own objective."""

    heads: int = 16  # number of heads to train: those with the largest mean |resample effect|
    steps: int = 40  # steps of Adam from the mean; 0 keeps the mean
    prompts: int = 8  # number of clean prompts to train on, the first ones
    rate: float = 0.3  # first step, as a fraction of the head's spread; falls linearly to 0

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("steps", 0), ("prompts", 1)):
            whole_number(f"optimal.{name}", getattr(self, name), least=least, error=ConfigError)
        number("optimal.rate", self.rate, above=0, error=ConfigError)


@dataclass(frozen=True)
class Constants:
    """Trained constants and their losses, head by head."""

    values: Float[Tensor, "head d_head"]  # fp32; the best of all steps
    start: Float[Tensor, " head"]  # loss of the mean, nats, over the training prompts
    loss: Float[Tensor, " head"]  # loss of `values`; never above `start`


@dataclass(frozen=True)
class _Prompts:
    """Clean prompts of one length, with the logits and streams of their unablated run."""

    tokens: Int[Tensor, "prompt pos"]
    reads: tuple[int, ...]
    logits: Float[Tensor, "prompt read d_vocab"]  # of the original model
    stream: list[Float[Tensor, "prompt pos d_model"]]  # per layer, entering the block


class Trainer:
    """Trains constants on the first clean prompts.

    Raises:
        MethodError: the gradient model does not support the model.
        ModelError: no gradient passes through its weights, see `attribution.check.check_model`.
    """

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, read: int, n: int) -> None:
        check_model(model)
        self.n_heads = int(model.cfg.n_heads)
        sites = [SITES["z"], SITES["resid_pre"]]
        self.gradients = GradientModel(model, sites, compute_dtype=compute_dtype_of(model))
        self.n_prompts = min(n, len(pairs))
        device = device_of(model)
        self._batches = make_batches(pairs, range(self.n_prompts), "noising", read, device)
        self._rest = make_batches(pairs, range(self.n_prompts, len(pairs)), "noising", read, device)
        self._prompts: list[_Prompts] = []
        # mean [layer, head, d_head] and spread [layer, head] over positions of all clean prompts
        self.mean = self.spread = torch.empty(0)

    def run(self) -> None:
        """Run all prompts unablated.

        Keeps streams and logits of the training prompts, and the mean and spread of z over all.
        """
        moments: list[list[Tensor]] = []
        count = 0
        for batch in (*self._batches, *self._rest):
            run = self.gradients.activations(batch.base, batch.reads)
            z = torch.stack([x.double() for x in run.sites["z"]]).unflatten(-1, (self.n_heads, -1))
            moments.append([z.sum(dim=(1, 2)), z.square().sum(dim=(1, 2))])
            count += batch.base.numel()
            if len(self._prompts) < len(self._batches):
                prompts = _Prompts(batch.base, batch.reads, run.logits, run.sites["resid_pre"])
                self._prompts.append(prompts)
        mean, square = (torch.stack(same).sum(dim=0) / count for same in zip(*moments, strict=True))
        self.mean = mean.float()
        variance = (square - mean.square()).mean(dim=-1)
        # a head with constant z has zero spread, which would make all steps zero
        self.spread = variance.clamp(min=1e-12).sqrt().float()

    def train(self, heads: Sequence[Head], settings: OptimalSettings) -> Constants:
        """Train constants of `heads` with Adam from their means; return the best of all steps."""
        layer, head = (list(ends) for ends in zip(*heads, strict=True))
        means, spread = self.mean[layer, head], self.spread[layer, head].unsqueeze(-1)
        offset = torch.zeros_like(means).requires_grad_()
        adam = torch.optim.Adam([offset], lr=settings.rate)
        best, start = means, torch.empty(0)
        best_loss = torch.full((len(heads),), float("inf"), device=means.device)
        with self.gradients.frozen():
            for step in range(settings.steps + 1):
                values = means + spread * offset
                trains = step < settings.steps
                adam.zero_grad()
                loss, gradient = self.loss(heads, values.detach(), gradient=trains)
                start = loss if step == 0 else start
                better = loss < best_loss
                best = torch.where(better.unsqueeze(-1), values.detach(), best)
                best_loss = torch.where(better, loss, best_loss)
                if trains:
                    values.backward(gradient)
                    for group in adam.param_groups:
                        group["lr"] = settings.rate * (1 - step / settings.steps)
                    adam.step()
        return Constants(best, start, best_loss)

    def loss(
        self, heads: Sequence[Head], values: Float[Tensor, "head d_head"], *, gradient: bool
    ) -> tuple[Float[Tensor, " head"], Float[Tensor, "head d_head"]]:
        """Return the mean KL(original || ablated) of each constant, in nats, and its gradient."""
        losses = torch.zeros(len(heads), device=values.device)
        gradients = torch.zeros_like(values)
        for prompts in self._prompts:
            size = max(1, TRAINING_TOKENS // prompts.tokens.numel())
            for layer in sorted({layer for layer, _ in heads}):
                of_layer = [i for i, (at, _) in enumerate(heads) if at == layer]
                for first in range(0, len(of_layer), size):
                    part = of_layer[first : first + size]
                    numbers = [heads[i][1] for i in part]
                    leaf = values[part].detach().requires_grad_(gradient)
                    with torch.set_grad_enabled(gradient):
                        kl = self._kl(prompts, layer, numbers, leaf) / self.n_prompts
                    if gradient:
                        kl.sum().backward()
                        assert leaf.grad is not None
                        gradients[part] += leaf.grad
                    losses[part] += kl.detach()
        return losses, gradients

    def _kl(
        self,
        prompts: _Prompts,
        layer: int,
        heads: Sequence[int],
        values: Float[Tensor, "head d_head"],
    ) -> Float[Tensor, " head"]:
        """Return the KL of each head's constant, summed over prompts; rows are (head, prompt)."""
        n = len(prompts.tokens)

        def write(place: Place, x: Tensor) -> None:
            if place.layer == layer:
                z = x.view(place.n_rows, place.n_pos, self.n_heads, -1)
                for i, head in enumerate(heads):
                    z[i * n : (i + 1) * n, :, head] = values[i].to(x)

        logits = self.gradients.forward(
            prompts.tokens.repeat(len(heads), 1),
            write,
            prompts.reads,
            sites=[SITES["z"]],
            entries={layer: prompts.stream[layer].repeat(len(heads), 1, 1)},
        )
        p = prompts.logits.log_softmax(dim=-1).repeat(len(heads), 1, 1)
        q = logits.log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=(1, 2)).unflatten(0, (len(heads), n)).sum(dim=1)
