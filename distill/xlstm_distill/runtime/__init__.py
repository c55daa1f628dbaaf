"""This process: its ranks, launcher, signals, terminal and device."""
