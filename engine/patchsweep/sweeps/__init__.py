"""Sweeps: planned, run into memory or a store, estimated, screened and sampled."""
