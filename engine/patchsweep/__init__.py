"""patchsweep: exact activation-patching sweeps in a few packed forward passes."""
