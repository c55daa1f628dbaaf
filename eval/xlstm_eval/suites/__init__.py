"""Suites: which tasks are run, and how."""

from xlstm_eval.suites.paper import paper_suite
from xlstm_eval.suites.suite import Suite, SuiteTask

__all__ = ["Suite", "SuiteTask", "paper_suite"]
