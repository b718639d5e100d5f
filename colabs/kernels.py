# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention over chosen blocks
#
# One function computes softmax attention, dense or over a list of key blocks
# for each query block and head. The lists may come out of a computation: they
# are traced, and a new selection compiles nothing. On a Hopper GPU kernels of
# ours run, elsewhere XLA; the results are the same.

# %%
# @title Install (on Colab; elsewhere this does nothing)
import os
import sys

# A clone of the repository, or what pip takes for one (git+https://...).
REPOSITORY = "/content/isthmus"  # @param {type:"string"}

if "google.colab" in sys.modules:
  get_ipython().run_line_magic("pip", f"install -q '{REPOSITORY}[colab]'")

# %% [markdown]
# What this machine is, and which implementation each op takes on it.

# %%
from isthmus.train import doctor

for line in doctor.summary():
  print(line)

# %% [markdown]
# ## A first call
#
# Queries are [batch, time, heads, width]; keys and values may have fewer heads.
# Without positions, `causal` is aligned at the end: the last query sees the
# last key.

# %%
import jax
import jax.numpy as jnp

from isthmus.attention import BlockMask, attention, explain

FAST = bool(os.environ.get("ISTHMUS_FAST"))  # tiny sizes, for the tests

LENGTH = 4096  # @param {type:"integer"}
HEADS = 8  # @param {type:"integer"}
WIDTH = 64  # @param {type:"integer"}
if FAST:
  LENGTH, HEADS, WIDTH = 1024, 2, 16

dtype = jnp.bfloat16 if jax.devices()[0].platform == "gpu" else jnp.float32
q, k, v = (
  jax.random.normal(key, (1, LENGTH, heads, WIDTH), dtype)
  for key, heads in zip(
    jax.random.split(jax.random.key(0), 3),
    (HEADS, HEADS // 2, HEADS // 2),
    strict=True,
  )
)
o, lse = attention(q, k, v, causal=True, return_lse=True)
print("o", o.shape, o.dtype, " lse", lse.shape, lse.dtype)

# %% [markdown]
# Which implementation that was, and why not another:

# %%
for row in explain(q, k, v, causal=True, return_lse=True):
  print(f"{row.name:8s} {row.verdict:8s} {row.reason}")

# %% [markdown]
# ## Block masks
#
# A `BlockMask` says which blocks of keys each block of queries sees. Blocks
# that are seen whole need no further test; in the others each pair is tested.
# Masks combine with `&` and `|`, and nothing as large as queries times keys is
# ever made.

# %%
import matplotlib.pyplot as plt

BLOCK = 128
ids = jnp.sort(jax.random.randint(jax.random.key(1), (1, LENGTH), 0, 4))
masks = {
  "causal": BlockMask.causal(LENGTH),
  "window": BlockMask.window((LENGTH // 8, 0), LENGTH),
  "documents": BlockMask.segments(ids) & BlockMask.causal(LENGTH),
  "window or stripes": BlockMask.causal(LENGTH)
  & (
    BlockMask.window((LENGTH // 8, 0), LENGTH)
    | BlockMask.strided(LENGTH // 2, LENGTH, width=BLOCK)
  ),
}
figure, axes = plt.subplots(1, len(masks), figsize=(14, 3.4))
for ax, (name, mask) in zip(axes, masks.items(), strict=True):
  mask.plot(ax=ax)
  ax.set_title(f"{name}: {float(mask.density):.2f} of the blocks", fontsize=9)
plt.show()

# %% [markdown]
# The same through an argument and through a mask:

# %%
by_mask = attention(q, k, v, mask=masks["documents"])
by_argument = attention(q, k, v, causal=True, segment_ids=ids)
difference = jnp.abs(by_mask - by_argument).astype(jnp.float32).max()
print(f"largest difference {difference:.1e}")
assert difference < 2e-2

# %% [markdown]
# ## Blocks chosen by the data
#
# Here each head takes the key blocks whose mean key scores highest with the
# mean query of a block, and the block on the diagonal. The choice is made
# inside `jit`, from a bool array; `capacity` is how many blocks a list has
# place for. A query block with more would be NaN and counted in `mask.dropped`:
# no block is left out in silence.

# %%
KEEP = 3
traces = []


@jax.jit
def sparse(q, k, v):
  traces.append(1)
  pooled_q, pooled_k = (
    x.astype(jnp.float32).reshape(1, -1, BLOCK, *x.shape[2:]).mean(2)
    for x in (q, k)
  )
  pooled_k = jnp.repeat(pooled_k, HEADS // pooled_k.shape[2], axis=2)
  scores = jnp.einsum("bind,bjnd->bnij", pooled_q, pooled_k)
  before = jnp.tri(scores.shape[-1], k=-1, dtype=bool)
  scores = jnp.where(before, scores, -jnp.inf)
  least = jax.lax.top_k(scores, KEEP)[0][..., -1:]
  blocks = (scores >= least) & before | jnp.eye(len(before), dtype=bool)
  mask = BlockMask.from_blocks(
    blocks, block=(BLOCK, BLOCK), capacity=KEEP + 1, causal=True
  )
  return attention(q, k, v, mask=mask), mask


o, mask = sparse(q, k, v)
other, _ = sparse(q[:, ::-1], k, v)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for head, ax in enumerate(axes):
  mask.plot(head=head, ax=ax)
plt.show()

assert len(traces) == 1, "a new selection was compiled"
assert int(mask.dropped) == 0 and bool(jnp.isfinite(o).all())

# %% [markdown]
# Against the formula, with the mask in full (for short sequences only):

# %%
with jax.default_matmul_precision("highest"):
  wide_q, wide_k, wide_v = (
    jnp.repeat(x.astype(jnp.float32), HEADS // x.shape[2], axis=2)
    for x in (q, k, v)
  )
  scores = jnp.einsum("btnd,bsnd->bnts", wide_q, wide_k) / WIDTH**0.5
  scores = jnp.where(mask.to_dense(), scores, -jnp.inf)
  expected = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores), wide_v)

difference = jnp.abs(o.astype(jnp.float32) - expected).max()
print(f"largest difference {difference:.1e}")
assert difference < 2e-2

# %% [markdown]
# Gradients go the same way; keys that no query's list holds get none.

# %%
gradient = jax.grad(
  lambda v: attention(q, k, v, mask=mask).astype(jnp.float32).sum()
)(v)
assert bool(jnp.isfinite(gradient).all())

# %% [markdown]
# ## How fast
#
# `python -m isthmus.attention.bench --peers` measures the same in full, beside
# cuDNN and whatever else is installed. In small, on this machine:

# %%
from isthmus.attention.bench import plot, run
from isthmus.attention.bench.case import grid
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.peers import JAX_PEERS, best, isthmus
from isthmus.attention.bench.rows import Row

gpu = jax.devices()[0].platform == "gpu"
lengths = (4096, 8192, 16384) if gpu else (256,) if FAST else (512, 1024)
cases = grid(
  ("causal", "sparse8"),
  lengths,
  (WIDTH,),
  tokens=lengths[-1],
  hidden=2 * WIDTH,
)
peers = [peer for peer in JAX_PEERS if not peer.absent()]
passes = ("fwd",) if FAST else ("fwd", "bwd")
rows = []
for case in cases:
  contenders = [isthmus(best(case)), *peers]
  for found in run.measure(case, contenders, passes, Clock(3, 0.02)):
    if isinstance(found, Row):
      rows.append(found)
      print(f"{case.label} {case.shape} {found.which}", end=" ")
      print(f"{found.who}: {found.ms:.2f} ms")
    else:
      print(found)

figure = plt.figure(layout="constrained")
plot.draw(rows, figure, jax.devices()[0].device_kind)
plt.show()

assert {row.case.mask for row in rows if row.ours} == {"causal", "sparse8"}
