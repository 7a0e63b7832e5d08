"""Small accumulators over pure functions."""
