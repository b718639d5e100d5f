"""Which machines run the kernels for Hopper."""

import jax
import pytest

from isthmus.pallas import hopper
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.hopper import refuse_machine

needs_mosaic = pytest.mark.skipif(not has_mosaic(), reason="jax before 0.11")


def test_an_older_jax_is_refused(monkeypatch):
  monkeypatch.setattr(hopper, "has_mosaic", lambda: False)
  assert refuse_machine() == f"it needs jax 0.11, and this is {jax.__version__}"


@needs_mosaic
def test_a_machine_without_hopper_is_refused(monkeypatch):
  said = "it needs an NVIDIA Hopper GPU, and the platform is cpu"
  assert refuse_machine() == said
  with interpreted():
    assert refuse_machine() is None
  assert refuse_machine() == said
  monkeypatch.setattr(hopper, "platform", lambda: "gpu")

  class Device:
    compute_capability = "8.0"

    def __str__(self):
      return "cuda:0"

  monkeypatch.setattr(hopper.jax, "local_devices", lambda: [Device()])
  assert refuse_machine() == (
    "it needs a Hopper GPU of compute capability 9.0, and this is cuda:0 of 8.0"
  )
  monkeypatch.setattr(Device, "compute_capability", "9.0")
  assert refuse_machine() is None
