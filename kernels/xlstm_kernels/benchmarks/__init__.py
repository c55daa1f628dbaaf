"""Benchmarks and the tuner, run as modules; nothing imports them."""
