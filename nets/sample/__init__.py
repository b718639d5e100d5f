"""Samplers: pure functions from parameters and keys to samples."""
