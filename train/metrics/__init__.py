"""Measures of finished runs: pure functions of arrays and bytes."""
