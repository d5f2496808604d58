"""Reading results: the Dataset accessor, and the comparison of estimates with exact effects."""
