"""Reports, rendered from the records in reports/data and from nothing else.

`render` writes them, `differences` compares them with what the records say, and `summary_json` is the last line of a run.
"""

from bench.report.site import differences, render
from bench.report.summary import summary_json

__all__ = ["differences", "render", "summary_json"]
