"""What a kernel pools besides."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.pool.api import refuse

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
  "shape, dtype, said",
  [
    ((1, 128, 2, 64), jnp.bfloat16, None),
    ((1, 300, 2, 128), jnp.float16, None),
    (
      (1, 300, 2, 128),
      jnp.float32,
      "it pools bfloat16 and float16, not float32",
    ),
    ((1, 300, 2, 40), jnp.float16, "it pools widths of 64 and 128, not 40"),
    (
      (1, 127, 2, 64),
      jnp.float16,
      "there is no whole block in (1, 127, 2, 64)",
    ),
    (
      (0, 300, 2, 64),
      jnp.float16,
      "there is no whole block in (0, 300, 2, 64)",
    ),
  ],
)
def test_what_is_refused(shape, dtype, said):
  assert refuse(jax.ShapeDtypeStruct(shape, dtype)) == said
