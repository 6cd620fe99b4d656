"""The lm-evaluation-harness, with a plan in both of its halves: scoring and writing."""
