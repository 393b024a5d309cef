"""Benchmarks: what is timed was first checked against the oracle, and every row says where and how it was measured."""
