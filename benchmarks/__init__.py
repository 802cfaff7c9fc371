"""Benchmarks: each prints its ratios against named peers, measured in the same run."""
