"""Rates, by a clock that is ours here."""

import math
import types

import jax
import numpy as np
import pytest

from isthmus.train import speed
from isthmus.train.tasks.classify import Classify
from tests.train import toy


@pytest.fixture
def made(monkeypatch):
  """A `Speed`, and its clock."""
  clock = types.SimpleNamespace(now=100.0)
  monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
  batch = {"image": np.zeros((16, 3, 3, 1))}
  run = types.SimpleNamespace(
    batch=batch,
    mesh=types.SimpleNamespace(devices=np.empty(2)),
    job=types.SimpleNamespace(task=Classify(), model=toy.Net()),
  )
  return speed.Speed(run), clock, run


def test_compiling_and_pauses_do_not_count(made):
  rate, clock, _ = made
  assert rate.metrics() == {} and rate.text({}) == ""
  rate.tick(1)  # the first step compiles
  assert rate.metrics() == {}
  clock.now += 2.0
  rate.tick(5)
  assert rate.metrics() == {"steps_per_second": 2, "images_per_second": 32}
  since = rate.take()
  rate.pause()
  clock.now += 1000.0
  rate.tick(6)
  assert rate.metrics(since) == {}
  clock.now += 1.0
  rate.tick(7)
  assert rate.metrics(since)["steps_per_second"] == 1
  assert rate.metrics()["steps_per_second"] == pytest.approx(5 / 3)
  assert rate.text(rate.metrics(since)) == "16 images/s"


def test_a_recent_rate_is_of_half_a_second_or_more(made):
  rate, clock, _ = made
  rate.tick(0)
  assert rate.recent() == {}  # nothing was timed yet
  # Steps of 0.2 s whose figures arrive late, then early.
  for step, now in enumerate((0.2, 0.55, 0.6, 0.8, 1.0, 1.2), start=1):
    clock.now = 100.0 + now
    rate.tick(step)
    found = rate.recent()["steps_per_second"]
    assert 3.6 < found < 5.1, (step, found)
  clock.now = 103.0  # a step that alone is long enough
  rate.tick(7)
  assert rate.recent()["steps_per_second"] == pytest.approx(1 / 1.8)


def test_a_clock_that_stands_gives_no_figure(made):
  rate, _, _ = made
  rate.tick(1)
  rate.tick(2)
  assert rate.metrics() == {}


def test_flops_and_their_share(made, monkeypatch):
  _, clock, run = made
  device = jax.local_devices()[0]
  monkeypatch.setattr(speed.peak, "measure", lambda _: 4e12)
  monkeypatch.setitem(speed.peak.DATASHEET, device.device_kind, 8e12)
  run.job.task = types.SimpleNamespace(throughput=lambda *_: ("rows", 16, 4e12))
  rate = speed.Speed(run)
  rate.tick(1)
  clock.now += 2.0
  rate.tick(2)
  found = rate.metrics()
  assert found["model_tflops_per_device"] == 1.0  # 4e12 / 2 s / 2 devices
  assert (found["mfu_measured"], found["mfu_datasheet"]) == (0.25, 0.125)
  assert rate.text(found) == "8 rows/s, 1 TF/s, MFU 12% of datasheet"
  assert not any(map(math.isnan, found.values()))
