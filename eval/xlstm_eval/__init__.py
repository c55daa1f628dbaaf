"""Measure a student against its teacher: suites, lm-eval's harness, the metric, the report."""
