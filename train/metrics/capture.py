"""Queries and keys of a model that reads a long text, as a bench takes them."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from isthmus.attention.sdpa import attention
from isthmus.data.text import Corpus

#: Queries, keys, values of one row.
Heads = tuple[
  Float[Array, "1 t N w"], Float[Array, "1 t K w"], Float[Array, "1 t K w"]
]


class _Keep(nn.Module):
  """Keeps a layer's arrays in the collection `captured`."""

  @nn.compact
  def __call__(self, **arrays):
    for name, x in arrays.items():
      self.sow("captured", name, x)


def _attend(q, k, v, **settings):
  _Keep(name="keep")(q=q, k=k, v=v)
  return attention(q, k, v, **settings)


def extended(model: Any, length: int, *, context: int) -> Any:
  """A decoder whose rotations are slowed for contexts beyond its training's.

  NTK-aware: the base is multiplied by `(length / context) ** (d / (d - 2))`,
  so that the slowest rotation is slowed by length / context and the fastest
  stays. Nothing changes up to `context`.

  Args:
    model: a `Decoder`.
    length: of what it is to read.
    context: of its training.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=9, width=8, depth=1, num_heads=2)
    >>> extended(model, 64, context=16).rope_theta
    160000.0
  """
  d = model.sizes[2]
  factor = max(length / context, 1.0)
  return model.clone(
    rope_theta=model.rope_theta * factor ** (d / max(d - 2, 1))
  )


def long_text(corpus: Corpus, tokenizer: Any, length: int) -> np.ndarray:
  """int32 [1, length]: a corpus's documents end to end, each after a start.

  Args:
    corpus: of which the "train" split is read, as far as it is needed.
    tokenizer: as in `isthmus.data.text.Text`.
    length: tokens.

  Raises:
    ValueError: the corpus has fewer.

  Example:
    >>> from isthmus.data.library import PythonLibrary
    >>> from isthmus.data.tokenizer import Bytes
    >>> tokens = long_text(PythonLibrary(), Bytes(), 1000)
    >>> tokens.shape, int(tokens[0, 0])
    ((1, 1000), 256)
  """
  found, total = [], 0
  for tokens, _ in tokenizer.encode(corpus.documents("train")):
    found += [[tokenizer.start], tokens]
    total += 1 + len(tokens)
    if total >= length:
      text = np.concatenate(found)[None, :length]
      return text.astype(np.int32)
  raise ValueError(f"{length} tokens are wanted, and the text has {total}")


def capture(
  model: Any,
  params: Any,
  tokens: Int[np.ndarray, "1 t"],
  layers: tuple[int, ...],
) -> tuple[
  Float[Array, "l 1 t n d"],
  Float[Array, "l 1 t k d"],
  Float[Array, "l 1 t k d"],
]:
  """(q, k, v) of some layers, turned to their positions, as attention has them.

  Layers after the last of them aren't run, nor is the head. All layers before
  are kept until those are taken.

  Args:
    model: a `Decoder` with `scan`.
    params: its parameters.
    tokens: a row.
    layers: their indices.

  Raises:
    ValueError: no such layer, a model whose layers aren't stacked.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=9, width=8, depth=3, num_heads=2)
    >>> tokens = np.ones((1, 5), np.int32)
    >>> params = model.init(jax.random.key(0), jnp.asarray(tokens))["params"]
    >>> capture(model, params, tokens, (0, 2))[0].shape
    (2, 1, 5, 2, 4)
  """
  if not layers or not 0 <= min(layers) <= max(layers) < model.depth:
    raise ValueError(f"layers are {layers}, of a model of {model.depth}")
  if not model.scan:
    raise ValueError("the model's layers aren't stacked; scan is False")
  depth = max(layers) + 1
  cut = model.clone(depth=depth, attend=_attend)
  stack = jax.tree.map(lambda x: x[:depth], params["stack"]["blocks"])
  params = {**params, "stack": {"blocks": stack}}

  @jax.jit
  def run(params, tokens):
    _, found = cut.apply({"params": params}, tokens, mutable=["captured"])
    each = {
      path[-2].key: x for path, x in jax.tree.leaves_with_path(found)
    }  # .../keep/q/0
    return tuple(each[name][np.array(layers)] for name in "qkv")

  return run(params, jnp.asarray(tokens))


@functools.partial(
  jax.jit, static_argnames=("heads", "kv_heads", "width", "dtype")
)
def regrouped(
  q: Float[Array, "l 1 t n d"],
  k: Float[Array, "l 1 t k d"],
  v: Float[Array, "l 1 t k d"],
  *,
  heads: int,
  kv_heads: int,
  width: int,
  dtype: Any = jnp.bfloat16,
) -> Heads:
  """Heads of several layers as those of one, of another width.

  The kv heads are those of the layers, one layer after the other, as many as
  are asked for; each has its own query heads, which are repeated from the
  first on where more are asked for, or cut. The width grows by a random matrix
  with orthonormal rows, one for each kv head: products of queries and keys,
  and so all that attention weighs, stay as they are, and no part is zero, which
  would draw less power than data does. Queries are multiplied by
  `(width / d) ** 0.5`, which makes up for the smaller default scale.

  Args:
    q, k, v: of `capture`.
    heads, kv_heads: of the result.
    width: of the result, at least d.
    dtype: of the result.

  Raises:
    ValueError: too few kv heads, a smaller width, heads that don't split.

  Example:
    >>> q, k = jnp.ones((3, 1, 5, 6, 8)), jnp.ones((3, 1, 5, 2, 8))
    >>> sizes = dict(heads=8, kv_heads=4, width=16)
    >>> [x.shape for x in regrouped(q, k, k, **sizes)]
    [(1, 5, 8, 16), (1, 5, 4, 16), (1, 5, 4, 16)]
  """
  (layers, _, t, n, d), own = q.shape, k.shape[3]
  if heads % kv_heads:
    raise ValueError(f"{heads} heads don't split over {kv_heads} kv heads")
  if layers * own < kv_heads:
    raise ValueError(
      f"{kv_heads} kv heads are wanted, and {layers} layers have {layers * own}"
    )
  if width < d:
    raise ValueError(f"the width is {width}, below the model's {d}")
  group, each = heads // kv_heads, n // own

  def flat(x, *shape):
    x = jnp.moveaxis(x[:, 0].reshape(layers, t, own, *shape), 1, 2)
    return x.reshape(layers * own, t, *shape)[:kv_heads].astype(jnp.float32)

  q, k, v = flat(q, each, d), flat(k, d), flat(v, d)
  q = q[:, :, np.arange(group) % each] * math.sqrt(width / d)
  if width > d:
    turns = jax.random.orthogonal(jax.random.key(0), width, (kv_heads,))[:, :d]
    wide = functools.partial(jnp.einsum, precision="highest")
    q = wide("ktgd,kdw->ktgw", q, turns)
    k, v = (wide("ktd,kdw->ktw", x, turns) for x in (k, v))
  q = jnp.moveaxis(q, 0, 1).reshape(1, t, heads, width)
  k, v = (jnp.moveaxis(x, 0, 1)[None] for x in (k, v))
  return q.astype(dtype), k.astype(dtype), v.astype(dtype)
