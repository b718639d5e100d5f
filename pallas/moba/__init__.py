"""Mixture of block attention: each query chooses the key blocks it reads."""
