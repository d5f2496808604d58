"""Sweeps: plan, run, store."""
