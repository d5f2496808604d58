"""What results say: the dataset accessor, the comparison of estimates with exact effects."""
