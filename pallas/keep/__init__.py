"""The best of each row, up to a sum of weights."""
