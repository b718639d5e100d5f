"""What `isthmus doctor` tells of this machine."""

import platform

import jax
import numpy as np

from isthmus.attention import sdpa
from isthmus.pallas.dispatch import Row
from isthmus.train import doctor, peak


def _report(monkeypatch):
  monkeypatch.setattr(peak, "measure", lambda device: 1.5e12)
  return list(doctor.report())


def test_report(monkeypatch):
  lines = _report(monkeypatch)
  assert f"python {platform.python_version()} on {platform.machine()}" in lines
  assert f"jax {jax.__version__}" in lines
  assert f"numpy {np.__version__}" in lines
  for device in jax.local_devices():
    assert f"device {device.id}: cpu {device.device_kind}" in lines
  assert "matrix products: 1.5 TF/s measured, no datasheet known" in lines


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
  assert "no-such-package not installed" in _report(monkeypatch)


def test_datasheet(monkeypatch):
  monkeypatch.setattr(peak, "datasheet", lambda device: 989.4e12)
  assert any("989.4 by the datasheet" in x for x in _report(monkeypatch))


def test_kernels_and_why_not(monkeypatch):
  rows = [
    Row("attention", "long", "fast", "refuses", "it rains"),
    Row("attention", "long", "xla", "runs", ""),
  ]
  monkeypatch.setattr(sdpa, "report", lambda: rows)
  assert _report(monkeypatch)[-2:] == [
    "attention, long: fast refuses: it rains",
    "attention, long: xla runs",
  ]
