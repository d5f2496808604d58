"""Optimal ablation: for each head the constant that changes the model's predictions least.

Li & Janson 2024, Optimal ablation for interpretability, arXiv:2409.09951: a component is replaced
by the constant that minimises the expected loss of the ablated model. Here the loss is
KL(original || ablated) of the next token at the positions read, in nats, averaged over clean
prompts; the constant takes the place of one head's z at every position of every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# tokens of one training pass; its graph keeps some 50 KB a token and layer
TRAINING_TOKENS = 1024


@dataclass  # Hydra fills it, which a frozen one does not allow
class OptimalSettings:
    """How constants are trained; each head's objective is its own."""

    heads: int = 16  # how many heads get one: those of the largest mean |resample effect|
    steps: int = 40  # of Adam, from the mean; 0 keeps the mean
    prompts: int = 8  # clean prompts that are trained on, the first ones; fewer if there are
    rate: float = 0.3  # first step, as a share of the head's own spread; falls to 0 evenly

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("steps", 0), ("prompts", 1)):
            whole_number(f"optimal.{name}", getattr(self, name), least=least, error=ConfigError)
        number("optimal.rate", self.rate, above=0, error=ConfigError)


@dataclass(frozen=True)
class Constants:
    """What training found, head by head."""

    heads: tuple[Head, ...]
    values: Float[Tensor, "head d_head"]  # fp32; the best that any step has met
    start: Float[Tensor, " head"]  # loss of the mean, nats, over the training prompts
    loss: Float[Tensor, " head"]  # loss of `values`; never above `start`


@dataclass(frozen=True)
class _Prompts:
    """Clean prompts of one length, run once."""

    tokens: Int[Tensor, "prompt pos"]
    reads: tuple[int, ...]
    logits: Float[Tensor, "prompt read d_vocab"]  # of the original model
    stream: list[Float[Tensor, "prompt pos d_model"]]  # per layer, entering the block


class Trainer:
    """Losses of constants on the first clean prompts, and their gradients.

    Raises:
        MethodError: the model has no plain modules that a gradient can go through.
        ModelError: its weights take none, see `attribution.check.check_model`.
    """

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, read: int, n: int) -> None:
        check_model(model)
        self.n_heads = int(model.cfg.n_heads)
        sites = [SITES["z"], SITES["resid_pre"]]
        self.tape = GradientModel(model, sites, compute_dtype=compute_dtype_of(model))
        self.n_prompts = min(n, len(pairs))
        device = device_of(model)
        self._batches = make_batches(pairs, range(self.n_prompts), "noising", read, device)
        self._rest = make_batches(pairs, range(self.n_prompts, len(pairs)), "noising", read, device)
        self._prompts: list[_Prompts] = []
        # [layer, head, d_head] over every position of every clean prompt
        self.mean = self.spread = torch.empty(0)

    def run(self) -> None:
        """Run all prompts unablated: what follows reads the streams and logits of those that are
        trained on, and z's mean and spread over all."""
        moments: list[list[Tensor]] = []
        count = 0
        for batch in (*self._batches, *self._rest):
            kept, logits = self.tape.activations(batch.base, batch.reads)
            z = torch.stack([x.double() for x in kept["z"]]).unflatten(-1, (self.n_heads, -1))
            moments.append([z.sum(dim=(1, 2)), z.square().sum(dim=(1, 2))])
            count += batch.base.numel()
            if len(self._prompts) < len(self._batches):
                prompts = _Prompts(batch.base, batch.reads, logits, kept["resid_pre"])
                self._prompts.append(prompts)
        mean, square = (torch.stack(same).sum(dim=0) / count for same in zip(*moments, strict=True))
        self.mean = mean.float()
        variance = (square - mean.square()).mean(dim=-1)
        # a head that gives the same z everywhere has no spread to measure steps by
        self.spread = variance.clamp(min=1e-12).sqrt().float()

    def train(self, heads: Sequence[Head], settings: OptimalSettings) -> Constants:
        """Constants of `heads` by Adam from their means; the best of all steps is kept."""
        layer, head = (list(ends) for ends in zip(*heads, strict=True))
        means, spread = self.mean[layer, head], self.spread[layer, head].unsqueeze(-1)
        moved = torch.zeros_like(means).requires_grad_()
        adam = torch.optim.Adam([moved], lr=settings.rate)
        best, start = means, torch.empty(0)
        least = torch.full((len(heads),), float("inf"), device=means.device)
        with self.tape.frozen():
            for step in range(settings.steps + 1):
                values = means + spread * moved
                trains = step < settings.steps
                adam.zero_grad()
                loss, gradient = self.loss(heads, values.detach(), gradient=trains)
                start = loss if step == 0 else start
                better = loss < least
                best = torch.where(better.unsqueeze(-1), values.detach(), best)
                least = torch.where(better, loss, least)
                if trains:
                    values.backward(gradient)
                    for group in adam.param_groups:
                        group["lr"] = settings.rate * (1 - step / settings.steps)
                    adam.step()
        return Constants(tuple(heads), best, start, least)

    def loss(
        self, heads: Sequence[Head], values: Float[Tensor, "head d_head"], *, gradient: bool
    ) -> tuple[Float[Tensor, " head"], Float[Tensor, "head d_head"]]:
        """Mean KL(original || ablated) of each head's constant, nats, and its gradient."""
        losses = torch.zeros(len(heads), device=values.device)
        gradients = torch.zeros_like(values)
        for prompts in self._prompts:
            size = max(1, TRAINING_TOKENS // prompts.tokens.numel())
            for layer in sorted({layer for layer, _ in heads}):
                mine = [i for i, (at, _) in enumerate(heads) if at == layer]
                for first in range(0, len(mine), size):
                    part = mine[first : first + size]
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
        """KL of each head's constant, summed over prompts; a row is one prompt and one head."""
        n = len(prompts.tokens)
        logits = self.tape.forward(
            prompts.tokens.repeat(len(heads), 1),
            self._writer(layer, heads, values, n),
            prompts.reads,
            sites=[SITES["z"]],
            first_layer=layer,
            stream=prompts.stream[layer].repeat(len(heads), 1, 1),
        )
        p = prompts.logits.log_softmax(dim=-1).repeat(len(heads), 1, 1)
        q = logits.log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=(1, 2)).unflatten(0, (len(heads), n)).sum(dim=1)

    def _writer(
        self, layer: int, heads: Sequence[int], values: Tensor, n: int
    ) -> Callable[[Place, Tensor], None]:
        def write(place: Place, x: Tensor) -> None:
            if place.layer == layer:
                z = x.view(place.n_rows, place.n_pos, self.n_heads, -1)
                for i, head in enumerate(heads):
                    z[i * n : (i + 1) * n, :, head] = values[i].to(x)

        return write
