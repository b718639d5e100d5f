"""The forward kernel alone, for each way to build it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.compat import has_mosaic

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.flash.configs import ALLOWED, guess
from isthmus.pallas.flash.mosaic_forward import ForwardConfig, forward
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import Plan
from tests.attention.oracle import by_hand, close
from tests.pallas.flash.hopper import Call, lowered, on, shapes

CONFIGS = [
  ForwardConfig(*values)
  for values in itertools.product(
    ALLOWED["block_k"], ALLOWED["stages"], ALLOWED["ping_pong"]
  )
]
CALL = Call((200, 264), (2, 1), predicate=Band(None, 0, 64))


def run(config, call, q, k, v):
  plan = Plan(call.lengths, band=call.predicate)
  return forward(q, k, v, plan, call.options, config)


def check(config):
  """Lengths are multiples of 8 here; the last query tile is cut short."""
  args, do, dlse = CALL.arrays()
  with on():
    o, lse = jax.jit(functools.partial(run, config, CALL))(*args)
  exact, low = (
    by_hand(args, do, dlse, CALL.mask(), dtype=dtype)[0]
    for dtype in (None, jnp.dtype(jnp.bfloat16))
  )
  t = CALL.lengths[0]
  assert o.shape == args[0].shape and lse.shape == (1, 2, 256)
  close(o, exact[0], low[0], 2, 1e-5)
  close(lse[..., :t], exact[1], exact[1], 0, 1e-4)


def test_smaller_steps_give_the_same():
  check(ForwardConfig(64, 4))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle(config):
  check(config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle_on_gpu(config):
  check(config)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_the_rule_of_thumb_fits_in_shared_memory(width):
  call = Call((300, 500), (4, 2), (width, width), Band(None, 0, 200))
  args = [
    jax.ShapeDtypeStruct((1, -(-x.shape[1] // 8) * 8, *x.shape[2:]), x.dtype)
    for x in shapes(call)[0]
  ]
  kernel = functools.partial(run, guess(width).forward, call)
  assert lowered(kernel, *args)[1] == ["flash_forward"]


def test_what_does_not_fit_is_said_while_lowering():
  call = Call((128, 128), (1, 1), (256, 256))
  kernel = functools.partial(
    forward,
    plan=Plan((128, 128)),
    options=call.options,
    config=ForwardConfig(128, 4),
  )
  with pytest.raises(ValueError, match="exceeds available shared memory"):
    lowered(kernel, *shapes(call)[0])
