"""Logits of a softmax, reduced over groups of keys in one pass over them."""
