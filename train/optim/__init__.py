"""Optimisers and schedules in optax's protocol."""
