"""The report: one page with scores, Win-and-Tie rates, gates, losses and provenance."""

from xlstm_eval.report.page import Curve, ReportData, ReportModel, render, write_report

__all__ = ["Curve", "ReportData", "ReportModel", "render", "write_report"]
