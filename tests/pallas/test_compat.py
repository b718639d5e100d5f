"""What differs between releases of jax, and the switch of the interpreter."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas import compat
from isthmus.pallas.compat import has_mosaic, interpreted, interpreting


@pytest.mark.parametrize(
  "version, has", [((0, 10, 2), False), ((0, 11, 0), True), ((0, 12), True)]
)
def test_mosaic_needs_jax_0_11(monkeypatch, version, has):
  monkeypatch.setattr(compat.jax, "__version_info__", version)
  assert has_mosaic() is has


def test_an_older_jax_is_told_by_its_version(monkeypatch):
  monkeypatch.setattr(compat.jax, "__version_info__", (0, 10, 2))
  monkeypatch.setattr(compat.jax, "__version__", "0.10.2")
  with pytest.raises(NotImplementedError, match=r"jax 0\.10\.2 .* 0\.11 can"):
    with interpreted():
      pass
  assert not interpreting()


def test_interpreting_is_of_one_kind():
  with interpreted("tpu"):
    assert interpreting("tpu") and not interpreting()
  assert not interpreting("tpu")


@pytest.mark.skipif(not has_mosaic(), reason="needs jax 0.11")
def test_interpreting_ends_with_its_block():
  assert not interpreting()
  with interpreted():
    assert interpreting()
  assert not interpreting()
  with pytest.raises(KeyError):
    with interpreted():
      raise KeyError
  assert not interpreting()


@pytest.mark.skipif(not has_mosaic(), reason="needs jax 0.11")
def test_jit_knows_whether_kernels_are_interpreted():
  """A function traced in one of the two is traced again in the other."""
  traced = []

  @jax.jit
  def function(x):
    traced.append(interpreting())
    return x + interpreting()

  x = jnp.zeros(())
  assert function(x) == 0
  with interpreted():
    assert function(x) == 1
    assert function(x) == 1
  assert function(x) == 0
  assert traced == [False, True]
