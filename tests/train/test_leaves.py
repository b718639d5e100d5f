"""A state as named arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train import leaves


def test_names_of_nested_trees():
  tree = {"a": [jnp.ones(1), None, {"b": 2}], "c": (np.ones(2),)}
  named = leaves.flatten(tree, prefix=("top",))
  assert list(named) == [
    ("top", "a", "0"),
    ("top", "a", "2", "b"),
    ("top", "c", "0"),
  ]
  nested = leaves.nest(named)
  assert nested["top"]["a"]["2"]["b"] == 2
  for name, leaf in named.items():
    assert leaves.pick(nested, name) is leaf


@jax.tree_util.register_pytree_with_keys_class
class Twins:
  def tree_flatten_with_keys(self):
    keys = [jax.tree_util.DictKey(k) for k in (1, "1")]
    return [(key, 0.0) for key in keys], None

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls()


@pytest.mark.parametrize(
  ("tree", "words"),
  [(Twins(), "two leaves are called 1"), (np.ones(1), "bare array")],
)
def test_names_that_would_not_tell_leaves_apart(tree, words):
  with pytest.raises(ValueError, match=words):
    leaves.flatten(tree)


@pytest.mark.parametrize(
  ("leaf", "dtype"),
  [
    (True, "bool"),
    (3, "int64"),
    (0.1, "float64"),
    (np.float64(0.1), "float64"),
    (np.ones((), np.int8), "int8"),
    (np.ones(2, jnp.bfloat16), "bfloat16"),
    (jnp.ones((2, 3), jnp.float8_e4m3fn), "float8_e4m3fn"),
  ],
)
def test_numbers_are_described_and_stored_exactly(leaf, dtype):
  entry, stored = leaves.describe(leaf), leaves.store(("x",), leaf)
  assert entry == {"shape": list(np.shape(leaf)), "dtype": dtype}
  assert str(stored.dtype) == dtype
  np.testing.assert_array_equal(np.asarray(stored), np.asarray(leaf))
  # what was stored comes back as it was, type and all
  back = leaves.restore(("x",), stored, leaf, entry)
  assert type(back) is type(leaf)
  np.testing.assert_array_equal(np.asarray(back), np.asarray(leaf))


@pytest.mark.parametrize(
  "leaf",
  [
    "text",
    b"bytes",
    np.array(["a"]),
    np.array([None]),
    np.array(3, "m8[s]"),
    np.array(3, "M8[s]"),
    np.zeros(2, [("a", "f4")]),
  ],
  ids=str,
)
def test_what_is_no_number_is_refused(leaf):
  with pytest.raises(ValueError, match="a/b is .*; a checkpoint holds arrays"):
    leaves.store(("a", "b"), leaf)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_stay_keys(impl):
  keys = jax.random.split(jax.random.key(3, impl=impl), 4)
  mesh = jax.make_mesh((4,), ("x",))
  sharding = jax.NamedSharding(mesh, jax.P("x"))
  struct = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding)
  blank = leaves.template(("k",), struct)
  stored = leaves.store(("k",), keys)
  assert (blank.shape, blank.dtype) == (stored.shape, stored.dtype)
  assert stored.dtype == jnp.uint32
  got = leaves.restore(
    ("k",), jax.device_put(stored, sharding), struct, leaves.describe(keys)
  )
  assert got.dtype == keys.dtype
  assert got.sharding.is_equivalent_to(sharding, 1)
  np.testing.assert_array_equal(jax.random.key_data(got), stored)


def test_an_array_read_wrong_is_refused():
  held = {"shape": [2], "dtype": "float32"}
  with pytest.raises(ValueError, match=r"x was read as float16\[2\]"):
    leaves.restore(("x",), np.ones(2, np.float16), np.ones(2), held)
