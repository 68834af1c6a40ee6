"""Puts this folder on the path: pytest's importlib mode does not, and `synthetic_records` is shared by the tests here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
