"""Suites: which tasks are run, and how."""

from xlstm_eval.suites.named import joined_settings, named_suite, suite_names, suite_settings
from xlstm_eval.suites.suite import Judge, Suite, SuiteTask

__all__ = [
    "Judge",
    "Suite",
    "SuiteTask",
    "joined_settings",
    "named_suite",
    "suite_names",
    "suite_settings",
]
