"""The forward kernel alone, for each way to build it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.compat import has_mosaic

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.flash.api import Extras
from isthmus.pallas.flash.configs import allowed, guess
from isthmus.pallas.flash.lists import listed
from isthmus.pallas.flash.mosaic_forward import ForwardConfig, fitted, forward
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import Plan
from tests.attention.oracle import by_hand, close
from tests.pallas.flash.hopper import Call, lowered, on, shapes

CONFIGS = [
  ForwardConfig(*values)
  for values in itertools.product(
    *(allowed(64)[x] for x in ("block_k", "stages", "ping_pong", "groups"))
  )
]
CALL = Call((200, 264), (2, 1), predicate=Band(None, 0, 64))
THREE = ForwardConfig(groups=3)
SHOWN = jnp.array([[[[1, 0, 1], [0, 1, 0], [1, 1, 0]]]], bool)
# Of a tile of 192 queries: one, fewer than all, all and one more; three tiles.
LENGTHS = {
  "one query": Call((1, 147), (4, 2)),
  "causal": Call((147, 147), (2, 1), predicate=Band(None, 0)),
  "window, softcap": Call((193, 200), predicate=Band(70, 20), softcap=1.5),
  "apart, empty rows": Call((400, 264), (1, 1), predicate=Band(90, -80)),
  "float16, a batch": Call((193, 128), (1, 1), dtype=jnp.float16, b=2),
  "lists, of tiles for two": Call(
    (300, 384), (1, 1), extras=Extras(lists=listed(SHOWN, block=(128, 128)))
  ),
}


def run(config, call, q, k, v, steps=math.inf):
  band = call.predicate or Band(None, None)
  plan = Plan(call.lengths, band=band, lists=call.extras.lists, steps=steps)
  return forward(q, k, v, plan, call.options, config)


def check(config, call=CALL):
  """Arrays end with a multiple of 8 tokens, the last query tile later."""
  args, do, dlse = call.arrays()
  t, lists = call.lengths[0], call.extras.lists
  side = 64 * (config.groups if lists is None else 2)
  even = [
    jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)]) for x in args
  ]
  with on():
    o, lse = jax.jit(functools.partial(run, config, call))(*even)
  exact, low = (
    by_hand(args, do, dlse, call.mask(), softcap=call.softcap, dtype=dtype)[0]
    for dtype in (None, jnp.dtype(call.dtype))
  )
  assert o.shape == even[0].shape
  assert lse.shape == (*exact[1].shape[:2], -(-t // side) * side)
  close(o[:, :t], exact[0], low[0], 2, 1e-5)
  slack = 1e-4
  if call.softcap is not None and jax.default_backend() == "gpu":
    slack += call.softcap * 2**-11  # as in equals_oracle
  close(lse[..., :t], exact[1], exact[1], 0, slack)


def test_smaller_steps_give_the_same():
  check(ForwardConfig(64, 4))


@pytest.mark.parametrize("name", LENGTHS)
def test_three_warpgroups_equal_the_oracle(name):
  check(THREE, LENGTHS[name])


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle(config):
  check(config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_equals_the_oracle_on_gpu(config):
  check(config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LENGTHS)
def test_three_warpgroups_equal_the_oracle_on_gpu(name):
  check(THREE, LENGTHS[name])


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_the_rule_of_thumb_fits_in_shared_memory(width):
  call = Call((300, 500), (4, 2), (width, width), Band(None, 0, 200))
  args = [
    jax.ShapeDtypeStruct((1, -(-x.shape[1] // 8) * 8, *x.shape[2:]), x.dtype)
    for x in shapes(call)[0]
  ]
  kernel = functools.partial(run, guess(width).forward, call)
  assert lowered(kernel, *args)[1] == ["flash_forward"]


def test_the_most_that_three_warpgroups_need_fits_in_shared_memory():
  """Outputs have memory of their own where a CTA takes several tiles."""
  call = Call((8192, 8192), (32, 1), predicate=Band(64, 0))
  kernel = functools.partial(run, ForwardConfig(128, 4, True, 3), call, steps=1)
  assert lowered(kernel, *shapes(call)[0])[1] == ["flash_forward"]


@pytest.mark.parametrize(
  "pairs, t, groups",
  [
    (16, 1024, 2),  # 128 tiles or 96, of 132 processors
    (17, 1024, 3),  # 136 or 102
    (4096, 128, 2),  # as many
    (4096, 256, 2),
    (4096, 257, 3),
    (32, 8192, 3),
  ],
)
def test_three_warpgroups_only_where_they_save_a_round(pairs, t, groups):
  config, two = ForwardConfig(64, 4, True, 3), ForwardConfig(64, 4, True, 2)
  assert fitted(config, pairs, t, False) == (config if groups == 3 else two)
  assert fitted(two, pairs, t, False) == two
  listed = ForwardConfig(64, 4, False, 2)
  assert fitted(config, pairs, t, True) == fitted(two, pairs, t, True) == listed


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
