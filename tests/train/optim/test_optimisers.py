"""Every optimiser in the common suite; a new optimiser is one entry."""

import functools

import optax
import pytest

from isthmus.train.optim import quant8
from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.muon import scale_by_muon
from tests.train.optim import suite
from tests.train.optim.suite import Entry


def _entry(name, scale, learning_rate, **kwargs):
  """A scale in the library's own chain, at rest after the last step."""

  def build(steps):
    return Optimizer(
      scale=scale,
      learning_rate=learning_rate,
      warmup=0,
      final=0.0,
      weight_decay=0.0,
      clip=None,
    ).build(steps)

  def inject(learning_rate):
    return optax.chain(scale(), optax.scale_by_learning_rate(learning_rate))

  return Entry(name=name, build=build, inject=inject, **kwargs)


_NO_DECAY = {"weight_decay": 0.0}


def _coded(name, make, learning_rate, **kwargs):
  """An optimiser of quant8, with codes for kernels alone, brought to rest."""
  make = functools.partial(make, codes=Codes(min_size=24, block=8))

  def build(steps):
    return make(optax.cosine_decay_schedule(learning_rate, steps))

  return Entry(
    name=name, build=build, inject=make, extra=r"(^|/)absmax/", **kwargs
  )


OPTIMISERS = [
  _entry("adam", Optimizer().scale, 0.1),
  _entry("sgd", optax.identity, 0.1),
  # Five steps of Newton and Schulz enlarge what is small, and its rounding, by
  # up to 3.44^5 = 480 times 2^-24.
  _entry("muon", scale_by_muon, 0.1, rounding=5e-5, extra=r"ns_coeffs$"),
  Entry(
    name="adamw, clipped",
    build=Optimizer(learning_rate=0.1, weight_decay=1e-4, final=0.0).build,
  ),
  _coded("adamw8bit", functools.partial(quant8.adamw8bit, **_NO_DECAY), 0.1),
  _coded("lion8bit", functools.partial(quant8.lion8bit, **_NO_DECAY), 0.05),
  _coded("momentum8bit", quant8.momentum8bit, 0.01),
  _coded("rmsprop8bit", quant8.rmsprop8bit, 0.1),
  _coded("adagrad8bit", quant8.adagrad8bit, 0.5),
  _coded(
    "adamw8bit, rounded at random",
    functools.partial(quant8.adamw8bit, **_NO_DECAY, rounding=True),
    0.1,
  ),
]


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
def test_optimiser(optimiser, assertion):
  assertion(optimiser)


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
def test_optimiser_resumes(optimiser, tmp_path):
  suite.assert_it_resumes(optimiser, tmp_path)
