"""The codec by arithmetic against the table and a search in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.codec import decode, encode
from isthmus.pallas.quant8.maps import SIGNED, UNSIGNED, Map, table

pytestmark = pytest.mark.once

MAPS = {
  "signed": SIGNED,
  "unsigned": UNSIGNED,
  "linear": Map(kind="linear"),
  "unsigned, linear": Map(kind="linear", signed=False),
}
each = pytest.mark.parametrize("which", MAPS.values(), ids=MAPS)


def middles(which):
  values = table(which)
  return (values[:-1] + values[1:]) * np.float32(0.5)


def numbers(which):
  """Uniform and log-uniform; values, midpoints and their neighbours."""
  rng, ties = np.random.default_rng(0), middles(which)
  signs = rng.choice([-1, 1], 2**20)
  y = [
    rng.uniform(-1, 1, 2**20),
    10 ** rng.uniform(-9, 0, 2**20) * signs,
    *(ties, np.nextafter(ties, 2), np.nextafter(ties, -2)),
    *(table(which), [0, 1, -1, 1e-30, -1e-30]),
  ]
  y = np.clip(np.concatenate(y), -1, 1).astype(np.float32)
  return y if which.signed else np.abs(y)


@each
def test_decoding_is_the_table_to_the_bit(which):
  codes = jnp.arange(256, dtype=jnp.int32)
  for run in (decode, jax.jit(decode, static_argnums=1)):
    np.testing.assert_array_equal(run(codes, which), table(which))


@each
def test_encoding_is_a_search_among_midpoints(which):
  """Two million numbers, ties and those beside them: no code differs."""
  y = numbers(which)
  got = jax.jit(functools.partial(encode, which=which))(y)
  np.testing.assert_array_equal(got, np.searchsorted(middles(which), y))


@each
def test_the_quick_encoder_differs_at_ties_only(which):
  y = numbers(which)
  run = functools.partial(encode, which=which, exact=False)
  got = np.asarray(jax.jit(run)(y))
  want = np.searchsorted(middles(which), y)
  off = got != want
  assert np.abs(got - want).max() <= 1 and off.any()
  tie = middles(which)[np.minimum(got, want)[off]]
  assert (np.abs(y[off] - tie) <= 1e-6 * np.abs(tie)).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_zero_free_maps_keep_small_numbers_off_zero(name, exact):
  plain = MAPS[name]
  free = Map(signed=plain.signed, zero_free=True)
  y = numbers(plain)
  y = y[(y == 0) | (np.abs(y) > 1e-37)]  # others count as 0 on a CPU
  a, b = (
    np.asarray(encode(jnp.asarray(y), m, exact=exact)) for m in (plain, free)
  )
  moved = a != b
  assert (a[moved] == plain.zero).all() and (y[moved] != 0).all()
  assert (np.abs(b[moved] - plain.zero) == 1).all()
  assert (np.sign(b - plain.zero) == np.sign(y)).all()
  assert moved.any()


@each
@pytest.mark.parametrize("exact", [True, False])
def test_nan_has_the_code_of_zero(which, exact):
  y = jnp.array([jnp.nan, 0.0])
  assert encode(y, which, exact=exact).tolist() == [which.zero] * 2
