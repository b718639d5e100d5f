"""`python -m isthmus.attention.bench` is the command."""

import subprocess
import sys

import pytest

from isthmus.attention.bench import __main__, cli

pytestmark = pytest.mark.once


def test_it_calls_the_command():
  assert __main__.main is cli.main


@pytest.mark.process
def test_it_answers():
  done = subprocess.run(
    [sys.executable, "-m", "isthmus.attention.bench", "--peers", "fa3"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith(
    "python -m isthmus.attention.bench: peer 'fa3'; there are cudnn, "
  )
