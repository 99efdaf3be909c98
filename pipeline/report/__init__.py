"""A report that opens anywhere: one HTML file with every map, curve and film strip of a store."""

from pipeline.report.page import write_report as write_report

__all__ = ["write_report"]
