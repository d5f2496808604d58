"""Paths: edges between the components of a model, estimated and exact, and circuits of them."""

from patchsweep.paths.circuits import circuit
from patchsweep.paths.edges import edges, exact_edges, screen_edges
from patchsweep.paths.nodes import Edge, Nodes, Reader, Sender
from patchsweep.paths.scores import circuit_scores

__all__ = [
    "Edge",
    "Nodes",
    "Reader",
    "Sender",
    "circuit",
    "circuit_scores",
    "edges",
    "exact_edges",
    "screen_edges",
]
