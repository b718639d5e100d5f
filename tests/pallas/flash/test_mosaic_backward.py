"""The backward kernels alone, for each way to build them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.flash.configs import allowed, guess
from isthmus.pallas.flash.mosaic_backward import (
  BackwardConfig,
  backward_keys,
  backward_queries,
  transposed,
)
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import Plan
from tests.attention.oracle import by_hand, close
from tests.pallas.flash.hopper import Call, lowered, on, shapes

CONFIGS = [
  BackwardConfig(*values)
  for values in itertools.product(allowed(64)["block"], allowed(64)["stages"])
]
CALL = Call((200, 136), (2, 1), predicate=Band(100, 20, -30))


def queries(config, call, *arrays):
  plan = Plan(call.lengths, band=call.predicate)
  return backward_queries(*arrays, plan, call.options, config)


def keys(config, call, wanted, *arrays):
  plan = Plan(call.lengths, band=transposed(call.predicate))
  return backward_keys(*arrays, plan, call.options, config, wanted=wanted)


def arrays_of(args, do, dlse, mask):
  """What the kernels take: the lse to base 2, inf where nothing is seen."""
  (o, lse), _ = by_hand(args, do, dlse, mask)
  delta = np.sum(np.asarray(do, np.float64) * o, axis=-1).swapaxes(1, 2)
  delta = np.where(np.isneginf(lse), 0, delta - np.asarray(dlse))
  lse2 = np.where(np.isneginf(lse), np.inf, lse / np.log(2))
  short = [(0, 0), (0, 0), (0, -lse.shape[2] % 128)]
  lse2 = np.pad(lse2, short, constant_values=np.inf)
  found = (lse2, np.pad(delta, short))
  return (*args, do, *(jnp.asarray(x, jnp.float32) for x in found))


def check(config, wanted):
  args, do, dlse = CALL.arrays()
  mask = CALL.mask()
  arrays = arrays_of(args, do, dlse, mask)
  low = jnp.dtype(jnp.bfloat16)
  (_, exact), (_, naive) = (
    by_hand(args, do, dlse, mask, dtype=dtype) for dtype in (None, low)
  )
  if wanted == ("dq",):
    kernel = functools.partial(queries, config, CALL)
  else:
    kernel = functools.partial(keys, config, CALL, wanted)
  with on():
    found = jax.jit(kernel)(*arrays)
  found = (found,) if wanted == ("dq",) else found
  names = ("dq", "dk", "dv")
  for name, mine in zip(wanted, found, strict=True):
    at = names.index(name)
    assert mine.shape == args[at].shape
    close(mine, exact[at], naive[at], 3, 1e-5)
  assert not mask.any(-1).all()  # some query sees nothing


WANTED = [("dq",), ("dk", "dv"), ("dk",), ("dv",)]


@pytest.mark.parametrize("wanted", [("dk",), ("dv",)], ids="-".join)
def test_a_gradient_of_its_own(wanted):
  """As the wide heads compute them."""
  check(BackwardConfig(64, 1), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle(config, wanted):
  check(config, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle_on_gpu(config, wanted):
  check(config, wanted)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_the_rule_of_thumb_fits_in_shared_memory(width):
  call = Call((304, 504), (4, 2), (width, width), Band(None, 0, 200))
  args, do, _ = shapes(call)
  rows = jax.ShapeDtypeStruct((1, 4, 384), jnp.float32)
  arrays, config = (*args, do, rows, rows), guess(width)
  kernel = functools.partial(queries, config.queries, call)
  assert lowered(kernel, *arrays)[1] == ["flash_backward_dq"]
  parts = [("dk", "dv")] if width <= 128 else [("dk",), ("dv",)]
  for wanted in parts:
    kernel = functools.partial(keys, config.keys, call, wanted)
    name = "flash_backward_" + "_".join(wanted)
    assert lowered(kernel, *arrays)[1] == [name]


@pytest.mark.parametrize(
  "band", [Band(None, 0, 7), Band(3, None, -2), Band(4, 1, 3), Band(2, -5)]
)
def test_transposed_is_the_band_of_the_transposed_mask(band):
  i, j = np.arange(20)[:, None], np.arange(31)
  mask = np.asarray(band(i, j, (), ()))
  turned = np.asarray(transposed(band)(j[:, None], i[:, 0], (), ()))
  np.testing.assert_array_equal(turned, mask.T)
  assert transposed(transposed(band)) == band
