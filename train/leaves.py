"""A state as named arrays: what a checkpoint can hold, and what fits it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: A leaf's path: ('params', 'mlp', 'kernel').
Name = tuple[str, ...]
_NUMBERS = (bool, int, float, complex)


def flatten(tree: Any, *, prefix: Name = ()) -> dict[Name, Any]:
  """The tree's leaves by name: `("params", "mlp", "kernel") -> leaf`.

  Example:
    >>> flatten({"mlp": {"kernel": 1.0}})
    {('mlp', 'kernel'): 1.0}
  """
  named: dict[Name, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    parts = (jax.tree_util.keystr((k,), simple=True) for k in path)
    name = (*prefix, *parts)
    if not name:
      raise ValueError("the state is a bare array; put it into a dict")
    if name in named:
      raise ValueError(f"two leaves are called {'/'.join(name)}")
    named[name] = leaf
  return named


def nest(named: dict[Name, Any]) -> Any:
  """Named leaves as nested dicts.

  Example:
    >>> nest({("mlp", "up"): 1.0, ("mlp", "down"): 2.0})
    {'mlp': {'up': 1.0, 'down': 2.0}}
  """
  if () in named:
    return named[()]
  tree: dict[str, Any] = {}
  for name, leaf in named.items():
    node = tree
    for part in name[:-1]:
      node = node.setdefault(part, {})
    node[name[-1]] = leaf
  return tree


def pick(tree: dict[str, Any], name: Name) -> Any:
  """The leaf of that name in nested dicts.

  Example:
    >>> pick({"mlp": {"kernel": 1.0}}, ("mlp", "kernel"))
    1.0
  """
  for part in name:
    tree = tree[part]
  return tree


def is_key(leaf: Any) -> bool:
  """Whether the leaf is an array of typed PRNG keys, or stands for one.

  Example:
    >>> is_key(jax.random.key(0)), is_key(jnp.zeros(2))
    (True, False)
  """
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> dict[str, Any]:
  """Shape and dtype as JSON; of a key also the generator.

  Example:
    >>> describe(jnp.zeros((2, 3)))
    {'shape': [2, 3], 'dtype': 'float32'}
    >>> describe(jax.random.key(0))["generator"]
    'threefry2x32'
  """
  if isinstance(leaf, _NUMBERS):
    leaf = np.asarray(leaf)
  entry = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
  if is_key(leaf) and isinstance(leaf, jax.Array):
    entry["generator"] = str(jax.random.key_impl(leaf))
  return entry


def store(name: Name, leaf: Any) -> jax.Array | np.ndarray:
  """The leaf as Orbax takes it; refuses what is no array of numbers.

  Example:
    >>> store(("key",), jax.random.key(7)).tolist()
    [0, 7]
    >>> store(("name",), "text")
    Traceback (most recent call last):
    ValueError: name is str; a checkpoint holds arrays
  """
  if isinstance(leaf, jax.Array):
    if leaf.is_deleted():
      raise ValueError(f"{'/'.join(name)} was donated; save before the step")
    if is_key(leaf):
      leaf = jax.random.key_data(leaf)
    if jax.process_count() > 1 and leaf.is_fully_addressable:
      return np.asarray(leaf)  # each process has its own: the first one's
    return leaf
  if isinstance(leaf, _NUMBERS):
    leaf = np.asarray(leaf)  # 64 bits wide, so that it comes back exactly
  if isinstance(leaf, np.ndarray | np.generic) and _is_numeric(leaf.dtype):
    return np.asarray(leaf)
  kind = getattr(leaf, "dtype", None) or type(leaf).__name__
  raise ValueError(f"{'/'.join(name)} is {kind}; a checkpoint holds arrays")


def mismatch(held: dict[Name, Any], wanted: dict[Name, Any]) -> str | None:
  """What differs between saved leaves and the ones asked for, or None.

  Args:
    held: name -> `describe`d leaf of the checkpoint.
    wanted: name -> leaf of the target.

  Example:
    >>> held = {("w",): describe(jnp.zeros(3))}
    >>> mismatch(held, {("w",): jnp.zeros(4)})
    'w is float32[3] in the checkpoint, float32[4] in the target'
  """
  wrong = []
  for name in [*wanted, *(n for n in held if n not in wanted)]:
    have = _spell(held[name]) if name in held else "missing"
    want = _spell(describe(wanted[name])) if name in wanted else "missing"
    if have != want:
      wrong.append(
        f"{'/'.join(name)} is {have} in the checkpoint, {want} in the target"
      )
  if not wrong:
    return None
  more = f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
  return wrong[0] + more


def template(name: Name, leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
  """What Orbax is asked for, to restore a leaf of the target.

  Example:
    >>> wanted = template(("key",), jax.random.key(0))
    >>> wanted.shape, wanted.dtype
    ((2,), dtype('uint32'))
  """
  if _on_host(leaf):
    entry = describe(leaf)
    return np.empty(entry["shape"], entry["dtype"])
  struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  if is_key(leaf):
    struct = jax.eval_shape(jax.random.key_data, struct)
  return jax.ShapeDtypeStruct(
    struct.shape, struct.dtype, sharding=_sharding(name, leaf)
  )


def restore(name: Name, got: Any, want: Any, held: dict[str, Any]) -> Any:
  """A leaf as the target asks for it, of what was read.

  Args:
    name: the leaf's.
    got: the array read, or None for an empty one, which Orbax doesn't store.
    want: the target's leaf.
    held: its description in the checkpoint.

  Raises:
    ValueError: the array read isn't the one described.

  Example:
    >>> saved = jnp.arange(3.0)
    >>> read = np.asarray(saved)
    >>> restore(("w",), read, np.zeros(3), describe(saved)).tolist()
    [0.0, 1.0, 2.0]
  """
  if _on_host(want):
    array = np.zeros(held["shape"], held["dtype"]) if got is None else got
    _check(name, array, held)
    return _like(np.asarray(array), want)
  sharding = _sharding(name, want)
  if got is None:
    blank = template(name, want)
    got = jax.device_put(np.zeros(blank.shape, blank.dtype), sharding)
  if is_key(want):
    got = jax.random.wrap_key_data(got, impl=held["generator"])
    if not got.sharding.is_equivalent_to(sharding, got.ndim):
      got = jax.device_put(got, sharding)
  _check(name, got, held)
  return got


def _check(name: Name, got: Any, held: dict[str, Any]) -> None:
  if _spell(describe(got)) != _spell(held):
    raise ValueError(
      f"{'/'.join(name)} was read as {_spell(describe(got))}, it was saved as "
      f"{_spell(held)}"
    )


def _is_numeric(dtype: np.dtype) -> bool:
  if dtype.kind in "mM":  # to numpy, time spans are integers
    return False
  return dtype.kind == "b" or jnp.issubdtype(dtype, np.number)


def _on_host(leaf: Any) -> bool:
  return isinstance(leaf, (np.ndarray, np.generic, *_NUMBERS))


def _like(array: np.ndarray, want: Any) -> Any:
  if isinstance(want, np.generic):  # before float: np.float64 is one
    return array[()]
  return type(want)(array.item()) if isinstance(want, _NUMBERS) else array


def _sharding(name: Name, leaf: Any) -> jax.sharding.Sharding:
  sharding = getattr(leaf, "sharding", None)
  if sharding is not None:
    return sharding
  if jax.process_count() > 1:
    raise ValueError(
      f"{'/'.join(name)} of the target has no sharding; with "
      f"{jax.process_count()} processes each leaf needs one"
    )
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _spell(entry: dict[str, Any]) -> str:
  return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"
