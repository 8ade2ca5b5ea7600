"""One self-contained HTML page that shows what runs found."""

from torchmto.lab.report.base import ReportError
from torchmto.lab.report.page import REPORT_NAME, page, write_report
from torchmto.lab.report.studies import read_studies

__all__ = ["REPORT_NAME", "ReportError", "page", "read_studies", "write_report"]
