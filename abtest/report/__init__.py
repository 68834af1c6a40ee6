"""The gate's own report: a page for every arm gated in full, and what the gate catches, from reports/data/gate alone.

`append_gate` and `write_sensitivity` keep records; `render` writes reports/gate. `python -m bench.report` renders it, too.
"""

from abtest.report.records import GateRecord, append_gate
from abtest.report.sensitivity_records import SensitivityLine, SweepLine, write_sensitivity
from abtest.report.site import files, render

__all__ = ["GateRecord", "SensitivityLine", "SweepLine", "append_gate", "files", "render", "write_sensitivity"]
