"""A trained model for other programs: merged, converted, quantised, and compared with the model that was trained."""

from minitune.export.report import Report
from minitune.export.run import FORMATS, QUANTS, export

__all__ = ["FORMATS", "QUANTS", "Report", "export"]
