"""Cases that between them hold every pair of settings, and their check.

`cases` draws, by a seed, few cases in which each pair of (dtype, heads, mask
kind, widths, lengths) that a backend takes occurs. `check` compares one with
the oracle of tests/attention/oracle.py: outputs, lse and all gradients, under
a random cotangent of each.
"""

import contextlib
import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention import EMPTY, BlockMask, attention
from isthmus.pallas.flash import chunked
from tests.attention.oracle import by_hand, close, oracle

DTYPES = ("float32", "bfloat16", "float16")
HEADS = ((4, 4), (8, 2), (6, 1), (9, 3))
WIDTHS = (
  *((32, 32), (59, 59), (64, 64), (96, 96), (128, 128), (160, 160)),
  *((256, 256), (64, 128), (96, 32)),
)
LENGTHS = (
  *((1, 1), (1, 147), (113, 203), (128, 217), (108, 256), (256, 512)),
  *((512, 256), (1023, 1024), (1024, 1023), (2048, 2048), (4096, 4096)),
)
PLAIN = ("none", "causal", "causal window")
KINDS = (
  *PLAIN,
  "window",
  "segments causal",
  "positions",
  "lists",
  "lists causal",
  "prefix",
  "block diagonal",
  "sinks",
  "softcap",
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A call: query and kv heads, widths of keys and values, lengths."""

  dtype: str
  heads: tuple[int, int]
  kind: str
  widths: tuple[int, int]
  lengths: tuple[int, int]

  def __str__(self):
    sizes = (*self.heads, *self.widths, *self.lengths)
    return f"{self.dtype}-{self.kind.replace(' ', '_')}-" + "x".join(
      map(str, sizes)
    )


def takes(backend: str, case: Case) -> bool:
  """Whether the contract says that a backend takes a case."""
  if backend == "mosaic":
    return case.dtype != "float32"
  if backend == "cudnn":
    t, s = case.lengths
    return (
      case.dtype != "float32"
      and case.kind in PLAIN
      and (case.kind == "none" or t == s)
      and t % 2 == s % 2 == 0
      and case.widths[0] == case.widths[1]
      and case.widths[0] % 8 == 0
    )
  return True


def cases(backend: str, max_length: int, seed: int = 0) -> list[Case]:
  """Cases of every pair of settings that the backend takes together."""
  lengths = tuple(x for x in LENGTHS if max(x) <= max_length)
  axes = (DTYPES, HEADS, KINDS, WIDTHS, lengths)
  whole = [
    values
    for values in itertools.product(*axes)
    if takes(backend, Case(*values))
  ]
  return [Case(*values) for values in covering(whole, seed)]


def covering(whole: list[tuple], seed: int = 0) -> list[tuple]:
  """Some of the cases, with every pair of settings that all of them have."""
  whole = list(whole)
  random.Random(seed).shuffle(whole)
  holding: dict[tuple, list[tuple]] = {}
  for values in whole:
    for pair in pairs(values):
      holding.setdefault(pair, []).append(values)
  left, found = set(holding), []
  for pair in sorted(left, key=repr):
    if pair in left:
      # The best of some hundred that hold a pair that is missing.
      some = holding[pair][:400]
      best = max(some, key=lambda v: len(left.intersection(pairs(v))))
      left -= pairs(best)
      found.append(best)
  return found


@functools.cache
def pairs(values: tuple) -> frozenset:
  """Each two of a case's settings, with their places."""
  return frozenset(itertools.combinations(enumerate(values), 2))


def settings(case: Case, b: int, block: tuple[int, int]):
  """(arguments, traced arrays, element mask [b n t s]) of a case.

  The mask is written down here, from the definition of each kind.
  """
  (n, heads), (t, s) = case.heads, case.lengths
  rng = np.random.default_rng(len(str(case)))
  i, j = np.arange(t)[:, None] + s - t, np.arange(s)
  mask = np.ones((1, 1, t, s), bool)
  kwargs, arrays = {}, {}
  if case.kind in ("causal", "sinks", "softcap", "segments causal"):
    kwargs["causal"], mask = True, mask & (j <= i)
  if case.kind == "causal window":
    kwargs |= {"causal": True, "window": (s // 3, 0)}
    mask = mask & (j <= i) & (j >= i - s // 3)
  if case.kind == "window":
    kwargs["window"] = (s // 4, s // 5)
    mask = mask & (j >= i - s // 4) & (j <= i + s // 5)
  if case.kind == "softcap":
    kwargs["softcap"] = 1.3
  if case.kind == "sinks":
    arrays["sinks"] = np.linspace(-1, 2, n).astype(np.float32)
  if case.kind == "segments causal":
    # The keys' ids; the last queries are of the last keys' documents.
    ids = np.cumsum(rng.random((b, max(t, s))) < 6 / s, axis=1, dtype=np.int32)
    q_ids, k_ids = ids[:, -t:], ids[:, -s:]
    arrays |= {"segment_ids": q_ids, "kv_segment_ids": k_ids}
    mask = mask & (q_ids[:, None, :, None] == k_ids[:, None, None])
  if case.kind == "positions":
    kwargs["causal"] = True
    q = rng.integers(0, s, (b, n, t), dtype=np.int32)
    k = np.argsort(rng.random((b, heads, s)), axis=-1).astype(np.int32)
    k[..., s - s // 4 :] = EMPTY
    arrays |= {"q_positions": q, "kv_positions": k}
    k = k.repeat(n // heads, axis=1)[:, :, None]
    mask = (k <= q[..., None]) & (k != EMPTY)
  if case.kind in ("lists", "lists causal"):
    shape = (b, n, -(-t // block[0]), -(-s // block[1]))
    arrays["blocks"] = rng.random(shape) < 0.5
    mask = arrays["blocks"].repeat(block[0], axis=2).repeat(block[1], axis=3)
    mask = mask[:, :, :t, :s]
    if case.kind == "lists causal":
      kwargs["causal"], mask = True, mask & (j <= i)
  if case.kind == "prefix":
    arrays["prefix"] = rng.integers(0, s, (b,), dtype=np.int32)
    mask = mask & ((j < arrays["prefix"][:, None, None, None]) | (j <= i))
  if case.kind == "block diagonal":
    mask = mask & (i // 48 == j // 48)
  return kwargs, arrays, np.broadcast_to(mask, (b, n, t, s))


def call(case: Case, block: tuple[int, int], impl, lse: bool, kwargs):
  """`attention` as a function of (q, k, v[, sinks]) and traced arrays."""
  t, s = case.lengths

  def run(args, arrays):
    given = dict(arrays)
    mask, blocks = None, given.pop("blocks", None)
    if blocks is not None:
      mask = BlockMask.from_blocks(blocks, block=block, q_length=t, kv_length=s)
    length = given.pop("prefix", None)
    if length is not None:
      mask = BlockMask.prefix(length, t, s, block=block)
    if case.kind == "block diagonal":
      mask = BlockMask.block_diagonal(48, t, s, block=block)
    if len(args) == 4:
      given["sinks"] = args[3]
    out = attention(
      *args[:3], mask=mask, return_lse=lse, impl=impl, **given, **kwargs
    )
    return out if lse else (out,)

  return run


def check(case: Case, impl: str) -> dict[str, tuple[float, float]]:
  """Compares (o, lse) and gradients with the oracle by the house's rule.

  Values may be off by twice, gradients by three times what attention written
  out in the case's own dtype is, and 1e-5.

  Returns:
    (error, allowed) by name.
  """
  t, s = case.lengths
  n, heads = case.heads
  lse = impl != "cudnn"  # which has none that can be differentiated
  b = 2 if t * s < 2**19 else 1
  block = (128, 128) if impl == "mosaic" else (32, 64)
  kwargs, arrays, mask = settings(case, b, block)
  rng, dtype = np.random.default_rng(t + s), jnp.dtype(case.dtype)
  d, dv = case.widths
  args, do, dlse = (
    [rng.standard_normal(x).astype(dtype) for x in shapes]
    for shapes in (
      [(b, t, n, d), (b, s, heads, d), (b, s, heads, dv)],
      [(b, t, n, dv)],
      [(b, n, t)] if lse else [],
    )
  )
  if "sinks" in arrays:
    args.append(arrays.pop("sinks"))
  given = [*do, *(x.astype(np.float32) for x in dlse)]
  softcap = kwargs.get("softcap")

  @jax.jit
  def ours(args, arrays, given):
    out, pull = jax.vjp(
      lambda *x: call(case, block, impl, lse, kwargs)(x, arrays), *args
    )
    return out, pull(tuple(given))

  args, arrays, given = jax.tree.map(jnp.asarray, (args, arrays, given))
  with chunks(impl):
    out = ours(args, arrays, given)
  both = exact_and_naive if t * s <= 2**18 else exact_and_naive_on_device
  exact, naive = both(args, given, mask, softcap, dtype)
  names = ("o", "lse")[: len(given)], ("dq", "dk", "dv", "dsinks")
  errors = {}
  for factor, place in ((2, 0), (3, 1)):
    rows = zip(out[place], exact[place], naive[place], strict=True)
    for name, (mine, best, low) in zip(names[place], rows, strict=False):
      assert mine.shape == best.shape and not np.isnan(mine).any(), name
      errors[name] = close(mine, best, low, factor, 1e-5)
  return errors


@contextlib.contextmanager
def chunks(impl):
  """On a CPU, chunks so small that short lengths make several."""
  known = dict(chunked.CHUNK)
  chunked.CHUNK["cpu"] = (64, 96)
  try:
    yield
  finally:
    chunked.CHUNK.update(known)


def exact_and_naive(args, given, mask, softcap, dtype):
  """What is right, and what attention written out in a dtype makes of it."""
  do, dlse = given if len(given) == 2 else (*given, None)
  one, other = (
    by_hand(args, do, dlse, mask, softcap=softcap, dtype=x)
    for x in (None, dtype)
  )
  return [(out[: len(given)], gradients) for out, gradients in (one, other)]


def exact_and_naive_on_device(args, given, mask, softcap, dtype):
  """The same for long cases: by XLA, and by float32 where memory asks it."""
  small = mask.shape[2] * mask.shape[3] <= 2**20

  # How fast a reference's products are doesn't matter: none is tuned.
  untuned = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

  @functools.partial(jax.jit, static_argnums=0, compiler_options=untuned)
  def run(precision, args, given):
    def written(q, k, v, *sinks):
      sinks = sinks[0].astype(q.dtype) if sinks else None
      return oracle(
        q, k, v, mask, sinks=sinks, softcap=softcap, precision=precision
      )[: len(given)]

    out, pull = jax.vjp(written, *args)
    given = [x.astype(y.dtype) for x, y in zip(given, out, strict=True)]
    return out, pull(tuple(given))

  naive = run(None, args, given)
  with jax.enable_x64(small):
    wide = np.float64 if small else np.float32
    args, given = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x, wide)), (args, given)
    )
    return jax.tree.map(np.asarray, run("highest", args, given)), naive
