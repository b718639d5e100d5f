"""What an implementation is told: static settings, and a tree of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import packed, uniform

pytestmark = pytest.mark.once


def test_options_are_static():
  assert hash(Options(4, 2)) == hash(Options(4, 2)) != hash(Options(4, 3))
  with pytest.raises(dataclasses.FrozenInstanceError):
    Options(4, 2).block = 8


def test_extras_are_a_tree_of_what_is_given():
  assert len(jax.tree.leaves(Extras(uniform(4, 4, block=2)))) == 6
  ids = jnp.zeros((1, 4), jnp.int32)
  extras = Extras(packed(ids, block=2), centroids=jnp.zeros((1, 4, 1, 8)))
  assert len(jax.tree.leaves(extras)) == 8
