"""Quadrature on [0, 1]: nodes and weights of integrals that know their error.

Every rule comes with coarser ones on some of its nodes. The difference of the two finest is the
error that is stated; it is that of the coarser one, so the value is usually better.

- `gauss`: Gauss-Legendre; the coarser rule interpolates every other node.
- `left`: k/n for k = 0 .. n-1 with equal weights, as the EAP-IG package has it. It is of first
  order only; for the comparison with published numbers.
- `nested`: Clenshaw-Curtis rules of 5, 9, 17, 33 and 65 nodes, each on every other node of the
  next. `steps="auto"` adds nodes until the error is small enough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from patchsweep.arguments import number, one_of, whole_number
from patchsweep.errors import MethodError

Rule = Literal["gauss", "left"]
Steps = int | Literal["auto"]
# intervals of the rules of `steps="auto"`
INTERVALS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Nodes in [0, 1], and the weights of rules on them, from coarse to fine."""

    nodes: NDArray[np.float64]  # [node]
    weights: NDArray[np.float64]  # [rule, node]
    level: NDArray[np.int64]  # [node] the first rule that uses the node

    @property
    def n_rules(self) -> int:
        return len(self.weights)

    def first(self, rule: int) -> NDArray[np.int64]:
        """Return the nodes that `rule` adds to those of coarser rules."""
        return np.flatnonzero(self.level == rule)


@dataclass(frozen=True)
class Path:
    """How an integral is taken: a fixed number of nodes, or as many as its error asks for.

    With `steps="auto"`, nodes are added until the stated error of every cell is at most `rtol`
    times the largest estimate of its pair and site, or the finest rule is used up.

    Raises:
        MethodError: a number is out of range, or settings exclude each other.
    """

    steps: Steps
    rule: Rule = "gauss"
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        one_of("rule", self.rule, get_args(Rule), error=MethodError)
        number("rtol", self.rtol, above=0, below=1, error=MethodError)
        if self.steps != "auto":
            whole_number("steps", self.steps, least=1, error=MethodError)
        elif self.rule != "gauss":
            raise MethodError(
                f"rule={self.rule} has a fixed number of steps; give one instead of auto"
            )

    @property
    def quadrature(self) -> Quadrature:
        """The nodes and rules."""
        if self.steps == "auto":
            return nested()
        return left(self.steps) if self.rule == "left" else gauss(self.steps)

    @property
    def adds_nodes(self) -> bool:
        """Whether nodes are added where the error is too large."""
        return self.steps == "auto"

    @property
    def usual_steps(self) -> int:
        """A number of nodes, for estimates of the cost."""
        return 17 if self.steps == "auto" else self.steps


def path_of(steps: Steps | None, rule: Rule, rtol: float) -> Path | None:
    """Return the path of the gradients; None: they are those of the base run.

    Raises:
        MethodError: a setting is out of range, or has no effect.
    """
    if steps is not None:
        return Path(steps, rule, rtol)
    if (rule, rtol) != (Path.rule, Path.rtol):
        raise MethodError(
            f"rule={rule!r} and rtol={rtol!r} are for an integral; give steps=20 or steps='auto', "
            "or leave them out"
        )
    return None


def settings_of(path: Path | None) -> dict[str, Any]:
    """Return the settings of a path for the results' identity."""
    return {"steps": None} if path is None else asdict(path)


@cache
def gauss(n: int) -> Quadrature:
    """Return the Gauss-Legendre rule of `n` nodes."""
    x, w = np.polynomial.legendre.leggauss(n)
    nodes = (x + 1) / 2
    coarse = np.zeros(n)
    coarse[::2] = _interpolating(nodes[::2]) if n > 1 else np.nan  # one node: nothing coarser
    return Quadrature(nodes, np.stack([coarse, w / 2]), np.arange(n) % 2)


@cache
def left(n: int) -> Quadrature:
    """Return the left Riemann sum of `n` nodes."""
    coarse = np.zeros(n)
    coarse[::2] = np.diff([*np.arange(0, n, 2), n]) / n if n > 1 else np.nan
    return Quadrature(np.arange(n) / n, np.stack([coarse, np.full(n, 1 / n)]), np.arange(n) % 2)


@cache
def nested() -> Quadrature:
    """Return the Clenshaw-Curtis rules of `INTERVALS`."""
    n = INTERVALS[-1]
    angle = np.pi * np.arange(n + 1) / n
    weights = np.zeros((len(INTERVALS), n + 1))
    level = np.full(n + 1, len(INTERVALS) - 1)
    for rule in reversed(range(len(INTERVALS))):
        step = n // INTERVALS[rule]
        weights[rule, ::step] = _interpolating((1 - np.cos(angle[::step])) / 2)
        level[::step] = rule
    return Quadrature((1 - np.cos(angle)) / 2, weights, level)


def _interpolating(nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights that integrate polynomials through `nodes` exactly."""
    basis = np.polynomial.legendre.legvander(2 * nodes - 1, len(nodes) - 1)
    moments = np.zeros(len(nodes))
    moments[0] = 1.0  # of Legendre polynomials on [0, 1]
    return np.asarray(np.linalg.solve(basis.T, moments), dtype=np.float64)
