"""Runners: compute the metrics of patched runs for a batch and a plan; the self-test picks one."""
