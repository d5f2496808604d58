"""Analyses on top of sweeps and attribution, one package each."""
