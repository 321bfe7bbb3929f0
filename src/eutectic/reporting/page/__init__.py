"""One page that tells what a merge did: from files to a record, from the record to a page."""

from eutectic.reporting.page.build import report
from eutectic.reporting.page.page_record import Report

__all__ = ["Report", "report"]
