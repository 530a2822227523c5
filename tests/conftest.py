"""Shared by all tests: the settings the command line makes, and runs of the command in a process of its own."""

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ["--config=smoke", "--config.batch_size=250", "--config.bn_group_size=50", "--config.views.size=8",
        "--config.method.queue_size=500", "--config.log.tensorboard=false", "--config.monitor.bank=300",
        "--config.monitor.queries=100"]


def moco_tf(*arguments, **options):
    """Runs `moco-tf` with these arguments; returns the finished process, its output as text."""
    return subprocess.run([sys.executable, "-m", "moco_tf", *map(str, arguments)], capture_output=True, text=True,
                          cwd=options.pop("cwd", ROOT), timeout=600, **options)


@pytest.fixture
def command():
    return moco_tf
