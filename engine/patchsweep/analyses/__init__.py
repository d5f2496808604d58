"""Analyses built on sweeps and attribution: attention, heads, logit lens and circuits."""
