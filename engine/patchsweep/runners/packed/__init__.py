"""The packed runner: runs exact patches in packed batches through the model's own blocks."""
