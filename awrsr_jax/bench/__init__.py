"""Benchmarks: how fast, how large, and beside whom."""
