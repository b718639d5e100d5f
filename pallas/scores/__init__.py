"""Sums and maxima of a softmax's probabilities, which never are stored."""
