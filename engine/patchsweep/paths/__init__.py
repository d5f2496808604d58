"""Paths: edges between the components of a model, estimated and exact."""

from patchsweep.paths.edges import edges, exact_edges, screen_edges
from patchsweep.paths.nodes import Edge, Nodes, Reader, Sender

__all__ = ["Edge", "Nodes", "Reader", "Sender", "edges", "exact_edges", "screen_edges"]
