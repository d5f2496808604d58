"""Where the files of a store lie: a local folder, or any address that fsspec opens."""
