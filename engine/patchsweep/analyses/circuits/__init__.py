"""Edges between the components of a model, estimated and exact, and circuits of nodes or edges."""

from patchsweep.analyses.circuits.acdc import acdc
from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.analyses.circuits.edges import edges, exact_edges, screen_edges
from patchsweep.analyses.circuits.exchange import read_circuit, write_circuit
from patchsweep.analyses.circuits.multiverse import multiverse
from patchsweep.analyses.circuits.nodes import Edge, Nodes, Reader, Sender
from patchsweep.analyses.circuits.scores import circuit_scores
from patchsweep.analyses.circuits.stability import bootstrap_circuit, cross_validate_circuit

__all__ = [
    "Edge",
    "Nodes",
    "Reader",
    "Sender",
    "acdc",
    "bootstrap_circuit",
    "circuit",
    "circuit_scores",
    "cross_validate_circuit",
    "edges",
    "exact_edges",
    "multiverse",
    "read_circuit",
    "screen_edges",
    "write_circuit",
]
