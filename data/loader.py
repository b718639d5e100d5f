"""Stateless batches: a batch is a function of (seed, step), nothing else.

Row r of step s is global position p = s * batch_size + r. Its epoch is
p // n, its example permute(p % n, n, (seed, epoch)). Epochs reshuffle, a
batch may straddle two of them, and resuming needs only the step. How many
processes or devices there are decides who loads a row, not what it holds.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from isthmus.data.permutation import permute
from isthmus.data.prefetch import prefetch
from isthmus.data.source import Example, Source

#: (example, rng) -> example.
Transform = Callable[[Example, np.random.Generator], Example]
#: Rows of a batch by number.
Rows = slice | np.ndarray | Sequence[int]
#: Field name -> array of all rows.
Batch = dict[str, jax.Array]

# Up to this many examples an epoch's order is made at once and kept: a few
# calls of numpy for each batch would take longer than a small model's step.
_KEPT = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
  """Shuffled, transformed, prefetched and sharded batches of a source.

  Args:
    source: examples; its `take(indices)` or `__getitems__(indices)` is used
      where there is one.
    batch_size: rows of the global batch, over all processes.
    seed: of the order and of the transforms, not negative.
    shuffle: False keeps the source's order.
    transform: (example, rng) -> example, a pure function; rng comes from
      (seed, epoch, index), so it does not depend on the step or the process.
    sharding: where `batch` puts the rows; its spec may shard the leading
      axis only, e.g. NamedSharding(mesh, P(("data", "fsdp"))). A process
      loads the rows of its own devices.
    arrange: a pure function of stacked rows, each by itself, applied last; it
      may change the fields, such as the order of the tokens in a row.
    prefetch: batches made ahead by a background thread.
    threads: read and transform the examples of a batch in that many threads;
      0 for none. Worth it where the work releases the GIL (image decoding).

  Raises:
    ValueError: an empty source, a size that is not positive, or a batch
      size that the sharded axes do not divide.

  Example:
    >>> from isthmus.data.source import ArraySource
    >>> source = ArraySource({"x": np.arange(10)})
    >>> loader = Loader(source, batch_size=4, seed=0, shuffle=False)
    >>> for step, batch in loader.iterate(1, 3):
    ...   print(step, batch["x"])
    1 [4 5 6 7]
    2 [8 9 0 1]
  """

  source: Source
  _: dataclasses.KW_ONLY
  batch_size: int
  seed: int
  shuffle: bool = True
  transform: Transform | None = None
  sharding: jax.sharding.Sharding | None = None
  arrange: Callable[[Example], Example] | None = None
  prefetch: int = 2
  threads: int = 0

  def __post_init__(self):
    least = {"batch_size": 1, "seed": 0, "prefetch": 1, "threads": 0}
    for name, low in least.items():
      if getattr(self, name) < low:
        raise ValueError(
          f"{name} is {getattr(self, name)}; it must be at least {low}"
        )
    if not len(self.source):
      raise ValueError("the source holds 0 examples; a loader needs at least 1")
    if self.sharding is not None:
      _check_sharding(self.sharding, self.batch_size)

  @property
  def num_batches(self) -> int:
    """Batches of one pass over the source, the last one counted."""
    return -(-len(self.source) // self.batch_size)

  def indices(self, step: int) -> Int[np.ndarray, "b"]:
    """The examples of the global batch of a step."""
    return self._locate(self._positions(step, None))[1]

  def host_batch(self, step: int, rows: Rows | None = None) -> Example:
    """Some rows of the global batch (all by default) as numpy arrays."""
    return self._load(self._positions(step, rows))

  def batch(self, step: int) -> Batch:
    """The global batch of a step as jax arrays, sharded as asked."""
    return self._put(self.host_batch(step, self._own_rows))

  def iterate(
    self, start: int, stop: int | None = None
  ) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) from start, made ahead in a thread; without end if None.

    Closing the generator stops the thread. An error in the thread is raised
    here, with a note that names its step.
    """
    if start < 0:
      raise ValueError(f"start is {start}; it must be at least 0")
    steps = itertools.count(start) if stop is None else range(start, stop)
    return prefetch(self.batch, steps, depth=self.prefetch)

  def once(self) -> Generator[Batch, None, None]:
    """Every example exactly once, the last batch padded to full size.

    Each batch has a further field "valid", float32 [b], 0 on padding rows,
    which repeat the last example. Sums weighted by it are exact for any
    batch size and number of devices.
    """
    made = prefetch(self._final, range(self.num_batches), depth=self.prefetch)
    with contextlib.closing(made):
      for _, batch in made:
        yield batch

  # -- who loads what --

  @functools.cached_property
  def _own_rows(self) -> np.ndarray | None:
    """Sorted rows of the global batch that this process's devices hold."""
    if self.sharding is None:
      return None
    held = np.zeros(self.batch_size, bool)
    shards = self.sharding.addressable_devices_indices_map((self.batch_size,))
    for index in shards.values():
      held[index] = True
    return np.flatnonzero(held)

  def _positions(self, step: int, rows: Rows | None) -> np.ndarray:
    if step < 0:
      raise ValueError(f"step is {step}; it must be at least 0")
    row = np.arange(self.batch_size, dtype=np.int64)
    return step * self.batch_size + (row if rows is None else row[rows])

  def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, index) of global positions."""
    n = len(self.source)
    epoch, offset = np.divmod(positions, n)
    if self.shuffle and n > _KEPT:
      offset = permute(offset, n, (self.seed, epoch))
    elif self.shuffle:
      for e in np.unique(epoch):
        rows = epoch == e
        offset[rows] = self._order(int(e))[offset[rows]]
    return epoch, offset

  @functools.cached_property
  def _order(self) -> Callable[[int], np.ndarray]:
    """An epoch's order; the last two are kept, for a batch may hold both."""
    n = len(self.source)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
      return permute(np.arange(n), n, (self.seed, epoch))

    return order

  def _final(self, step: int) -> Batch:
    positions = self._positions(step, self._own_rows)
    last = len(self.source) - 1
    host = self._load(np.minimum(positions, last))
    if "valid" in host:
      raise ValueError(
        f"the source has a field 'valid' among {sorted(host)}, the name that"
        " once() gives to its padding mask; rename it in transform"
      )
    return self._put({**host, "valid": (positions <= last).astype(np.float32)})

  # -- host work --

  @functools.cached_property
  def _map(self) -> Callable[..., Iterable]:
    if not self.threads:
      return map
    return ThreadPoolExecutor(self.threads, "isthmus-examples").map

  def _load(self, positions: np.ndarray) -> Example:
    rows = self._stacked(positions)
    return rows if self.arrange is None else self.arrange(rows)

  def _stacked(self, positions: np.ndarray) -> Example:
    epochs, indices = self._locate(positions)
    take = getattr(self.source, "take", None)
    several = getattr(self.source, "__getitems__", None)
    if take is not None:
      stacked = take(indices)
      for name, array in stacked.items():
        if np.shape(array)[:1] != indices.shape:
          raise ValueError(
            f"field {name!r}: take({len(indices)} indices) gave an array of"
            f" shape {np.shape(array)}"
          )
      if self.transform is None:
        return stacked
      names = list(stacked)
      columns = zip(*stacked.values(), strict=True)
      examples = [dict(zip(names, row, strict=True)) for row in columns]
    elif several is not None:
      examples = several(indices.tolist())
    else:
      examples = None
    if self.transform is not None or examples is None:
      fetched = itertools.repeat(None) if examples is None else examples
      work = self._map(
        self._prepare, fetched, epochs.tolist(), indices.tolist()
      )
      examples = list(work)
    return stack(examples, indices)

  def _prepare(self, example: Any, epoch: int, index: int) -> Example:
    example = self.source[index] if example is None else example
    if self.transform is None:
      return example
    rng = np.random.default_rng((self.seed, epoch, index))
    return self.transform(example, rng)

  # -- device work --

  def _put(self, host: Example) -> Batch:
    arrays = {name: _canonical(name, array) for name, array in host.items()}
    if self.sharding is None:
      return jax.device_put(arrays)
    return {k: self._place(v, self.sharding) for k, v in arrays.items()}

  def _place(
    self, array: np.ndarray, sharding: jax.sharding.Sharding
  ) -> jax.Array:
    """A global array from the rows that this process has loaded."""
    shape = (self.batch_size, *array.shape[1:])
    slot = np.zeros(self.batch_size, np.int64)
    slot[self._own_rows] = np.arange(len(array))
    shards = sharding.addressable_devices_indices_map(shape)
    parts = []
    for index in shards.values():
      # A shard's rows are consecutive and all loaded, so they stay so here.
      rows = slot[index[0] if index else slice(None)]
      parts.append(array[rows[0] : rows[-1] + 1])
    # device_put, as make_array_from_callback trips the transfer guard.
    parts = jax.device_put(parts, list(shards))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def stack(
  examples: Sequence[Example], indices: Int[np.ndarray, "b"]
) -> Example:
  """Stack examples field by field; bytes and str become object arrays.

  Raises:
    ValueError: examples that differ in their fields, or in a field's shape
      or dtype; it names the field, both examples and both shapes.

  Example:
    >>> examples = [{"x": np.zeros(2)}, {"x": np.ones(2)}]
    >>> stack(examples, np.array([0, 1]))["x"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
  """
  first, names = examples[0], list(examples[0])
  for example, index in zip(examples, indices, strict=True):
    if example.keys() != first.keys():
      raise ValueError(
        f"example {index} has fields {sorted(example)}, example {indices[0]}"
        f" has {sorted(first)}"
      )
  return {
    name: _column([e[name] for e in examples], name, indices) for name in names
  }


def _column(values: list, name: str, indices: np.ndarray) -> np.ndarray:
  if isinstance(values[0], bytes | str):
    column = np.empty(len(values), object)
    column[:] = values
    return column
  arrays = [np.asarray(value) for value in values]
  for array, index in zip(arrays, indices, strict=True):
    for what in ("shape", "dtype"):
      mine, its = getattr(array, what), getattr(arrays[0], what)
      if mine != its:
        raise ValueError(
          f"field {name!r}: example {index} has {what} {mine}, example"
          f" {indices[0]} has {its}; a batch needs equal ones (crop, pad or"
          " cast in transform)"
        )
  return np.stack(arrays)


def _canonical(name: str, array: np.ndarray) -> np.ndarray:
  """The dtype that jax will use, refused where values would not survive."""
  array = np.asarray(array)
  if array.dtype.kind in "OSUMm":
    raise ValueError(
      f"field {name!r} has dtype {array.dtype}, which no device holds; encode"
      " or drop it in transform, or read it from host_batch"
    )
  dtype = jax.dtypes.canonicalize_dtype(array.dtype)
  if dtype != array.dtype and dtype.kind in "iu" and array.size:
    limits = np.iinfo(dtype)
    low, high = array.min(), array.max()
    if low < limits.min or high > limits.max:
      raise ValueError(
        f"field {name!r} spans [{low}, {high}], beyond {dtype}'s"
        f" [{limits.min}, {limits.max}]; enable jax_enable_x64 or rescale it"
      )
  return array.astype(dtype, copy=False)


def _check_sharding(sharding: jax.sharding.Sharding, batch_size: int) -> None:
  if not isinstance(sharding, jax.sharding.NamedSharding):
    sharding.shard_shape((batch_size,))
    return
  spec = tuple(sharding.spec)
  if any(part is not None for part in spec[1:]):
    raise ValueError(
      f"the batch is sharded as {sharding.spec}; a loader shards the leading"
      " axis only, let the step constrain the others"
    )
  axes = spec[0] if spec and spec[0] is not None else ()
  axes = axes if isinstance(axes, tuple) else (axes,)
  shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes], dtype=int))
  if batch_size % shards:
    raise ValueError(
      f"batch_size {batch_size} is not a multiple of {shards}, the size of the"
      f" mesh axes {axes} that shard it"
    )
