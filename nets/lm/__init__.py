"""Language models: published ones that load, and those of papers."""
