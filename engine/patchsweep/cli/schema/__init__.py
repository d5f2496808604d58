"""What each verb is told: dataclasses that Hydra fills from `conf/` and the command line."""
