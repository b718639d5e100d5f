"""Readers of weight files: nothing in them is run, every size is checked."""
