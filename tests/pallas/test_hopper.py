"""Which machines run the kernels for Hopper, on which arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas import hopper
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.hopper import padded, refuse_arrays, refuse_machine

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


@pytest.mark.parametrize(
  "dtype, d, said",
  [
    (jnp.float32, 64, "it takes bfloat16 and float16, not float32"),
    (jnp.bfloat16, 300, "it takes widths up to 256, not 300"),
    (jnp.bfloat16, 256, None),
    (jnp.float16, 64, None),
  ],
)
def test_arrays_that_are_refused(dtype, d, said):
  x = jax.ShapeDtypeStruct((1, 128, 2, d), dtype)
  assert refuse_arrays(x, x) == said


def test_empty_arrays_are_refused():
  x = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
  none = jax.ShapeDtypeStruct((1, 0, 2, 64), jnp.bfloat16)
  said = "it takes no empty arrays: (1, 8, 2, 64), (1, 0, 2, 64)"
  assert refuse_arrays(x, none) == said


def test_what_is_added_is_zero():
  x = jnp.ones((2, 100, 1, 100))
  found = padded(x, 64)
  assert found.shape == (2, 128, 1, 128) and found.sum() == x.size
  np.testing.assert_array_equal(found[:, :100, :, :100], x)
  assert padded(found, 64).shape == found.shape


@pytest.mark.parametrize(
  "work, steps, walks",
  [
    (32768 / 256 * 256 / 2, 256, 2),  # a proxy's at 128K tokens
    (65536 / 256 * 512 / 2, 512, 1),
    (8192 / 256 * 64 / 2, 64, 8),
    (3, 3, 3),  # fewer tiles than processors
  ],
)
def test_walks_are_no_shorter_than_an_even_share(work, steps, walks):
  found = hopper.walks(work, steps)
  assert found == walks
  assert steps / found >= min(work / hopper.PROCESSORS, steps)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("few", [24, 56])
def test_registers_are_those_there_are(workers, few):
  most = hopper.registers(workers, few)
  assert most % 8 == 0 and most > few
  assert 128 * (workers * most + few) <= hopper.REGISTERS
