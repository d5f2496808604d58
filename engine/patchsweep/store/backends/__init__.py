"""Backends for the files of a store: a local folder, or any URL that fsspec opens."""
