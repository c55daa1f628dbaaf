"""Figures of the report: pure functions that return SVG."""
