"""What a step minimises and an evaluation sums: one file a family."""
