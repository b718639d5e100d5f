"""Products of narrow numbers are summed wide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas import precision
from isthmus.pallas.precision import accumulator, dot, exact_dot


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_are_float32(dtype):
  x = jnp.ones((2, 4099), dtype)
  y = jax.jit(lambda x: dot("ij,kj->ik", x, x))(x)
  assert y.dtype == jnp.float32 == accumulator(dtype)
  np.testing.assert_array_equal(y, 4099)  # float16 and bfloat16 have no 4099


def test_float64():
  with jax.enable_x64(True):
    x = jnp.full((1, 1), 1 + 1e-12)
    assert float(dot("ij,jk->ik", x, x)[0, 0]) > 1 + 1.5e-12


def test_operands_stay_narrow_off_the_cpu(monkeypatch):
  monkeypatch.setattr(precision, "platform", lambda: "gpu")
  x = jnp.ones((2, 4), jnp.bfloat16)
  (eqn,) = jax.make_jaxpr(lambda x: dot("ij,kj->ik", x, x))(x).eqns
  assert [v.aval.dtype for v in eqn.invars] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("equation", ["btm,btv->mv", "btm,btv->vm"])
def test_transposed_products_of_bfloat16_run_on_a_cpu(equation):
  x, y = jnp.ones((2, 16, 32), jnp.bfloat16), jnp.ones((2, 16, 64))
  run = jax.jit(lambda y: dot(equation, x, y.astype(jnp.bfloat16)).T)
  np.testing.assert_array_equal(run(y), 32)


@pytest.mark.parametrize(
  ("dtype", "asked", "want"),
  [
    (jnp.float32, None, jax.lax.Precision.HIGHEST),
    (jnp.float32, "tensorfloat32", jax.lax.Precision.HIGH),
    (jnp.bfloat16, None, None),
  ],
)
def test_float32_is_multiplied_whole_unless_asked(dtype, asked, want):
  x = jnp.ones((2, 4), dtype)
  with jax.default_matmul_precision(asked):
    jaxpr = jax.make_jaxpr(lambda x: exact_dot("ij,kj->ik", x, x))(x)
  (found,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  assert found.params["precision"] in (want, (want, want))
