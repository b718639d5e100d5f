"""What `isthmus doctor` tells of this machine."""

import dataclasses
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import sdpa
from isthmus.pallas import dispatch, hopper
from isthmus.pallas.compat import has_mosaic
from isthmus.pallas.dispatch import Row
from isthmus.pallas.flash import chunked, cudnn
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


@dataclasses.dataclass(frozen=True)
class Device:
  """What is asked of a device; a CPU's and a TPU's have no capability."""

  platform: str
  device_kind: str
  compute_capability: str | None = None


T4 = Device("gpu", "Tesla T4", "7.5")
A100 = Device("gpu", "NVIDIA A100-SXM4-40GB", "8.0")
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", "9.0")
RADEON = Device("gpu", "AMD Instinct MI300X", "gfx942")
TPU = Device("tpu", "TPU v5 lite")
CPU = Device("cpu", "cpu")


def _machine(monkeypatch, device):
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  for module in (dispatch, chunked, cudnn, hopper):
    monkeypatch.setattr(module, "platform", lambda: device.platform)


@pytest.mark.parametrize(
  "device, notice",
  [
    (
      T4,
      "Tesla T4 (sm_75): attention runs on XLA; the fast kernels need sm_80 "
      "or newer",
    ),
    (
      TPU,
      "TPU v5 lite: attention runs on XLA; the fast kernels need an NVIDIA GPU "
      "of sm_80 or newer",
    ),
    (
      CPU,
      "cpu: attention runs on XLA; the fast kernels need an NVIDIA GPU of "
      "sm_80 or newer",
    ),
    (
      RADEON,
      "AMD Instinct MI300X: attention runs on XLA; the fast kernels need an "
      "NVIDIA GPU of sm_80 or newer",
    ),
    (A100, None),
    (H100, None),
  ],
  ids=lambda x: x.device_kind if isinstance(x, Device) else "",
)
def test_a_machine_without_fast_kernels_is_told_so(monkeypatch, device, notice):
  _machine(monkeypatch, device)
  lines = list(doctor.summary())
  if notice is None:
    assert list(doctor.notices()) == []
    kernel = "mosaic" if device is H100 and has_mosaic() else "cudnn"
    assert f"attention, bfloat16, causal: {kernel}" in lines
    assert "attention, float32, causal: chunked" in lines
  else:
    assert lines[-1] == notice
    assert lines.count(notice) == 1
    assert "attention, bfloat16, causal: chunked" in lines


def test_summary_is_device_and_versions_first(monkeypatch):
  _machine(monkeypatch, T4)
  first, second, *_ = doctor.summary()
  assert first == "1 device: Tesla T4 (sm_75)"
  assert second.startswith(f"python {platform.python_version()}, isthmus ")
  assert f"jax {jax.__version__}" in second


@pytest.mark.parametrize(
  "device, reason",
  [
    (T4, "it needs compute capability 8.0, and the GPU has 7.5"),
    (TPU, "it needs an NVIDIA GPU, and the platform is tpu"),
  ],
  ids=lambda x: x.device_kind if isinstance(x, Device) else "",
)
def test_old_gpus_and_tpus_fall_back_with_a_reason(monkeypatch, device, reason):
  """Nothing crashes: cuDNN refuses, XLA runs."""
  _machine(monkeypatch, device)
  x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
  rows = {row.name: row for row in sdpa.explain(x, x, x, causal=True)}
  assert rows["cudnn"].verdict == "refuses" and rows["cudnn"].reason == reason
  assert rows["chunked"].verdict == "runs"
  assert sdpa.attention(x, x, x, causal=True).shape == x.shape
  with pytest.raises(NotImplementedError, match=reason):
    sdpa.attention(x, x, x, causal=True, impl="cudnn")
