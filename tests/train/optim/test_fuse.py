"""Steps taken whole: the chain's numbers, on one device and on eight."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.dispatch import prefer
from isthmus.train.mesh import P, shardings
from isthmus.train.optim import fuse, quant8
from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.fuse import Fused, advance
from isthmus.train.optim.quant8 import adamw8bit, scale_by_adam8bit
from tests.train.optim.test_quant8 import RULES, collectives, placed, random

MAKES = {
  "adamw": adamw8bit,
  "lion": quant8.lion8bit,
  "momentum": quant8.momentum8bit,
}


@pytest.mark.parametrize(
  "make, dtype",
  [
    ("adamw", jnp.float32),
    ("adamw", jnp.bfloat16),
    ("lion", jnp.float32),
    ("momentum", jnp.float32),
  ],
)
def test_the_whole_step_is_the_chain(make, dtype):
  params = {
    "w": random((64, 512)).astype(dtype),
    "b": random((64,), 1).astype(dtype),
  }
  tx = MAKES[make](optax.linear_schedule(0.1, 0.01, 4))
  p, q, state, held = params, params, tx.init(params), tx.init(params)
  for i in range(4):
    g = jax.tree.map(lambda p, i=i: jnp.sin((i + 1) * p), params)
    u, state = jax.jit(tx.update)(g, state, p)
    p = optax.apply_updates(p, u)
    q, held = jax.jit(tx.step)(q, g, held)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x.astype(jnp.float32),
      y.astype(jnp.float32),
      **(
        {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"atol": 0.03}
      ),
    ),
    p,
    q,
  )
  assert q["w"].dtype == dtype
  assert jax.tree.structure(held) == jax.tree.structure(state)
  assert int(held[0].count) == int(held[-1].count) == 4
  for name in held[0].moments:
    x, y = (s[0].moments[name].codes["w"] for s in (state, held))
    assert (x != y).mean() < 1e-3


def test_what_rounds_at_random_takes_no_whole_step():
  assert isinstance(adamw8bit(0.1), Fused)
  assert not isinstance(adamw8bit(0.1, rounding=True), Fused)


def taken(tx, both, specs=None, count=3):
  """Parameters and state after whole steps, and the compiled step's text."""
  grow = lambda p, i: jax.tree.map(lambda p: p * i + jnp.sin(37 * p), p)
  gradients = [grow(both[0], i) for i in range(1, count + 1)]
  if specs is not None:
    both = jax.device_put(both, specs)
    gradients = jax.device_put(gradients, [specs[0]] * count)
  run = jax.jit(tx.step, out_shardings=specs)
  # As users compile it: without optimisation (conftest.py) the last bits were
  # seen to depend on the shape that a device holds.
  run = run.lower(both[0], gradients[0], both[1]).compile(
    {"xla_backend_optimization_level": 3}
  )
  for g in gradients:
    both = run(both[0], g, both[1])
  return both, run.as_text()


@pytest.mark.parametrize("clip", [None, 1.0], ids=("free", "clipped"))
def test_eight_devices_take_the_whole_step_of_one(clip):
  """To the bit; nothing moves between devices but, if asked for, the norm."""
  params, mesh = placed()
  del params["down"]
  rules = (RULES[0], RULES[2])
  tx = fuse.chain(
    scale_by_adam8bit(codes=Codes(rules=rules)),
    learning_rate=0.1,
    weight_decay=0.1,
    clip=clip,
  )
  both = (params, tx.init(params))
  want, _ = taken(tx, both)
  with jax.set_mesh(mesh):
    got, text = taken(tx, both, shardings(both, rules, mesh))
  assert got[0]["both"]["kernel"].sharding.spec == P("fsdp", "model")
  if clip is None:
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert collectives(text) == []
    return
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got[0],
    want[0],
  )
  assert set(collectives(text)) == {"all-reduce"}
  for shapes in re.findall(r"= (.*) all-reduce(?:-start)?\(", text):
    assert re.fullmatch(r"[(), ]*(f32\[\][(), ]*)+", shapes), shapes


@pytest.mark.once
@pytest.mark.skipif(not has_mosaic(), reason="the kernel needs jax 0.11")
@pytest.mark.parametrize("spread", [False, True], ids=("one", "eight"))
def test_the_kernel_takes_what_a_device_holds(spread):
  """Once, for all of the part; the other parameter has it in XLA."""
  params = {
    "up": {"kernel": jnp.ones((64, 512))},
    "down": {"kernel": jnp.ones((512, 64))},
  }
  _, mesh = placed()
  rules = RULES[:2] if spread else ()
  tx = adamw8bit(0.1, codes=Codes(rules=rules))
  both = (params, tx.init(params))
  with interpreted(), prefer("mosaic", "xla"):
    with jax.set_mesh(mesh) if spread else contextlib.nullcontext():
      text = str(jax.make_jaxpr(tx.step)(both[0], *both))
  assert text.count("name=adam8bit") == 1
  assert f"Ref{{u8[{64 if spread else 128},256]}}" in text
  assert "optimization_barrier" not in text


@pytest.mark.once
@pytest.mark.skipif(not has_mosaic(), reason="the kernel needs jax 0.11")
def test_the_kernel_takes_the_whole_step():
  """Interpreted: the rate, the decay and the clipping reach it."""
  params = {"kernel": random((8, 256))}
  g = jax.tree.map(lambda p: jnp.sin(7 * p), params)
  tx = fuse.chain(
    scale_by_adam8bit(codes=Codes(min_size=0)),
    learning_rate=optax.constant_schedule(0.1),
    weight_decay=0.5,
    clip=1.0,
  )
  want = jax.jit(tx.step)(params, g, tx.init(params))
  with interpreted(), prefer("mosaic", "xla"):
    got = jax.jit(tx.step)(params, g, tx.init(params))
    text = str(jax.make_jaxpr(tx.step)(params, g, tx.init(params)))
  assert "name=adam8bit" in text
  np.testing.assert_allclose(
    got[0]["kernel"], want[0]["kernel"], rtol=1e-4, atol=1e-7
  )
  moved = jnp.abs(got[0]["kernel"] - params["kernel"])
  assert moved.min() > 0.01


# --- the chain ---


def test_the_library_s_chain_is_whole():
  """Clipping, a schedule, decay of kernels alone: all within the step."""
  whole = Optimizer(
    scale=functools.partial(scale_by_adam8bit, b2=0.95),
    learning_rate=0.1,
    warmup=2,
    weight_decay=0.5,
    clip=1.0,
  ).build(40)
  params = {"kernel": random((64, 512)), "scale": random((64,), 1)}
  state = whole.init(params)
  p, q, held = params, params, state
  run, update = jax.jit(whole.step), jax.jit(whole.update)
  for i in range(4):
    # The first is beyond the bound, the last below it.
    g = jax.tree.map(lambda p, i=i: jnp.sin(7 * p) / 1e2**i, params)
    u, state = update(g, state, p)
    p = optax.apply_updates(p, u)
    q, held = run(q, g, held)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), p, q
    )
  assert jax.tree.structure(held) == jax.tree.structure(state)


def test_a_mask_may_end_above_the_leaves():
  tx = fuse.chain(
    scale_by_adam8bit(),
    0.5,
    weight_decay=0.5,
    decays={"a": True, "b": False},
  )
  params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "b": jnp.ones(2)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  got, _ = tx.step(params, zeros, tx.init(params))
  assert got["a"]["x"][0] == got["a"]["y"][0] == 0.75 and got["b"][0] == 1.0


@pytest.mark.once
def test_a_nan_in_the_gradient_is_not_clipped_away():
  tx = fuse.chain(scale_by_adam8bit(), 0.1, clip=1.0)
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  g = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
  got, _ = tx.step(params, g, tx.init(params))
  assert all(jnp.isnan(x).all() for x in jax.tree.leaves(got))


@pytest.mark.once
def test_other_scalings_are_not_whole():
  tx = fuse.chain(optax.scale_by_adam(), 0.1)
  assert not isinstance(tx, Fused)
  assert not isinstance(optax.chain(adamw8bit(0.1)), Fused)


@pytest.mark.once
def test_whoever_can_takes_the_step():
  def step(params, gradients, state):
    return params - 10 * gradients, state

  plain = optax.sgd(1.0)
  for tx, want in ((plain, 1.0), (Fused(plain.init, plain.update, step), -8)):
    got, _ = advance(tx, jnp.float32(2), jnp.float32(1), tx.init(None))
    assert got == want
