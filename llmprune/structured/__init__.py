"""Structured pruning: whole key/value groups and FFN channels go, and a smaller plain model is left."""
