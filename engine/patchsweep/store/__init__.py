"""The store: one Zarr group per run, written shard by shard by any number of processes."""
