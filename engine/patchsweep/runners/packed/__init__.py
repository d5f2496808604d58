"""The packed runner: exact patches in packed batches, through the model's own blocks."""
