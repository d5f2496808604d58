"""Edges between the components of a model, estimated and exact, and circuits of nodes or edges."""

from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.edges import edges, exact_edges, screen_edges
from patchsweep.analyses.circuits.nodes import Edge, Nodes, Reader, Sender
from patchsweep.analyses.circuits.scores import circuit_scores

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
