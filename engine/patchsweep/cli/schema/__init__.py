"""Configs of the verbs: dataclasses that Hydra fills from `conf/` and the command line."""
