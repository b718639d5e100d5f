"""What an implementation is told: static settings, and a tree of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.predicate import Band


def test_equal_options_share_a_compiled_function():
  traces = []

  def call(options, x):
    traces.append(options)
    return options.scale * x

  call = jax.jit(call, static_argnums=0)
  for scale in (0.5, 0.5, 0.25):
    assert call(Options(scale=scale, predicate=Band(3, 0)), 2.0) == 2 * scale
  assert len(traces) == 2


def test_options_do_not_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Options().scale = 2.0


def test_extras_are_a_tree_of_what_is_given():
  assert jax.tree.leaves(Extras()) == []
  given = Extras(q=(jnp.zeros(2),), dropout_key=jax.random.key(0))
  assert len(jax.tree.leaves(given)) == 2
