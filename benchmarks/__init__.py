"""Measurements that take minutes; each writes its figures to benchmarks/results."""
