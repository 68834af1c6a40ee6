"""Shared by all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any test module


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu", action="store_true", help="fail when lossless gates were not executed because they need a GPU"
    )
