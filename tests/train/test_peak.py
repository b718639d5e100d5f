"""The figures that a utilisation is divided by."""

import jax
import pytest

from isthmus.train import peak


def test_datasheet(monkeypatch):
  device = jax.devices()[0]
  assert peak.datasheet(device) is None
  monkeypatch.setitem(peak.DATASHEET, device.device_kind, 121e12)
  assert peak.datasheet(device) == 121e12
  for figure in peak.DATASHEET.values():
    assert 1e13 < figure < 1e16


def test_measure(monkeypatch):
  """FLOPs over the best time: the clock is ours, the products are run."""
  ticks = iter([0.0, 0.4, 10.0, 10.2])  # 0.4 s and 0.2 s
  monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks))
  peak.measure.cache_clear()
  rate = peak.measure(jax.devices()[1], repeats=2)
  assert rate == pytest.approx(4 * 2 * 1024**3 / 0.2)
  assert peak.measure(jax.devices()[1], repeats=2) == rate  # no more ticks
  peak.measure.cache_clear()


def test_a_slow_device_is_measured_once(monkeypatch):
  ticks = iter([0.0, 4.0])
  monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks))
  peak.measure.cache_clear()
  rate = peak.measure(jax.devices()[1])
  assert rate == pytest.approx(4 * 2 * 1024**3 / 4.0)
  peak.measure.cache_clear()
