"""What a pass contains, and what a run says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench import run
from isthmus.attention.bench.case import PASSES, Case
from isthmus.attention.bench.clock import Clock, inputs
from isthmus.attention.bench.peers import Contender
from isthmus.attention.bench.rows import Refusal, Row

pytestmark = pytest.mark.once

CASE = Case("causal", 1, 32, 2, 8)
CLOCK = Clock(rounds=1, seconds=1e-4)


@jax.custom_vjp
def _toy(q, k, v):
  return jnp.sin(q) + k + v


def _toy_forward(q, k, v):
  """What is kept is the output, as in attention: it can't be left out."""
  out = _toy(q, k, v)
  return out, out


_toy.defvjp(
  _toy_forward,
  lambda out, do: (do * jnp.tanh(out), do, do),
)


def _text(which):
  sets = inputs(1, 32, 2, 8, jnp.float32, count=4)
  program, given = run._program(which, _toy, (), sets)
  program(*given[0])
  return program.call.as_text()


def test_the_backward_program_has_no_forward_in_it():
  """`sine` stands for the forward kernel, `tanh` for the backward one."""
  texts = {which: _text(which) for which in PASSES}
  has = {w: ("sine(" in t, "tanh(" in t) for w, t in texts.items()}
  assert has == {
    "fwd": (True, False),
    "bwd": (False, True),
    "fwd+bwd": (True, True),
  }


def test_both_ways_give_the_gradient():
  sets = inputs(1, 32, 2, 8, jnp.float32, count=4)
  q, k, v, do = sets[0]
  both, given = run._program("fwd+bwd", _toy, (), sets)
  out, gradients = both(*given[0])
  alone, given = run._program("bwd", _toy, (), sets)
  np.testing.assert_allclose(out, _toy(q, k, v), rtol=1e-6)
  expected = (do * jnp.tanh(_toy(q, k, v)), do, do)
  for found in (gradients, alone(*given[0])):
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)


def _kernel(x):
  """A custom call under the name of a callback."""
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return jax.pure_callback(lambda x: np.asarray(x), shape, x)


@pytest.mark.parametrize("again", [False, True])
def test_a_forward_kernel_in_the_backward_program_is_noted(again):
  function = jax.custom_vjp(lambda q, k, v: _kernel(q) + k + v)
  function.defvjp(
    lambda q, k, v: (function(q, k, v), q),
    lambda q, do: ((_kernel(q) if again else q) * do, do, do),
  )
  one = Contender("toy", lambda case: (function, ()))
  found = list(run.measure(CASE, [one], ["fwd", "bwd"], CLOCK))
  rows = {row.which: row for row in found if isinstance(row, Row)}
  assert rows["fwd"].kernels and not rows["fwd"].note
  assert ("again" in rows["bwd"].note) == again


def test_who_refuses_does_not_stop_the_others():
  def refuse(case):
    raise NotImplementedError("never")

  def broken(q, k, v):
    raise RuntimeError("it broke")

  contenders = [
    Contender("a", refuse),
    Contender("b", lambda case: (broken, ()), ours=True),
    Contender("c", lambda case: (_toy, ())),
  ]
  found = list(run.measure(CASE, contenders, ["fwd", "bwd"], CLOCK))
  said = [str(f) for f in found if isinstance(f, Refusal)]
  where = "causal B1 S32 H2 D8"
  assert said == [
    f"a, {where}: never",
    f"b, {where} fwd: RuntimeError: it broke",
    f"b, {where} bwd: RuntimeError: it broke",
  ]
  rows = [f for f in found if isinstance(f, Row)]
  assert [(r.who, r.which) for r in rows] == [("c", "fwd"), ("c", "bwd")]
  assert all(r.ms > 0 and r.first_seconds for r in rows)


def test_a_mask_is_built_of_the_case():
  case = Case("sparse8", 1, 512, 2, 64)
  causal = dataclasses.replace(case, mask="causal")
  rows = [
    Row("isthmus x", True, causal, "fwd", ms=40.0),
    Row("isthmus y", True, causal, "fwd", ms=20.0),
    Row("fast", False, causal, "fwd", ms=1.0),
  ]
  found = run.mask_build(case, CLOCK, rows)
  assert found.dense_ms == 20.0
  assert found.share == pytest.approx(found.ms / 20.0)
