"""Runners: given a batch and a plan, the metrics of every patched run."""
