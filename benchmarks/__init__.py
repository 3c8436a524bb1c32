"""Benchmarks that run for minutes. Each writes its figures to benchmarks/results."""
