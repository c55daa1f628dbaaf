"""Benchmarks, run as modules; nothing imports them."""
