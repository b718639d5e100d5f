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
# # isthmus in ten minutes
#
# You will train a small language model on Python's own source, read what it
# writes, and take it apart. It runs on a CPU, a GPU or a TPU, and downloads no
# data.

# %%
# @title Install (on Colab; elsewhere this does nothing)
import os
import sys

# A clone of the repository, or what pip takes for one (git+https://...).
REPOSITORY = "/content/isthmus"  # @param {type:"string"}

if "google.colab" in sys.modules:
  get_ipython().run_line_magic("pip", f"install -q '{REPOSITORY}[colab]'")

# %% [markdown]
# What this machine is, and which implementation each op takes on it. Where no
# fast kernel runs, plain XLA does, and the last line says so: everything below
# works all the same.

# %%
from isthmus.train import doctor

for line in doctor.summary():
  print(line)

# %% [markdown]
# ## A recipe
#
# A recipe is a Python file that builds real objects: a model, a task, data, an
# optimiser, and the job that holds them. `config.load` gives the job, with any
# field of any object in it changed by `name=value`. `smoke` is the recipe's
# smallest variant.

# %%
FAST = bool(os.environ.get("ISTHMUS_FAST"))  # tiny sizes, for the tests

STEPS = 300  # @param {type:"integer"}
WIDTH = 64  # @param {type:"integer"}
if FAST:
  STEPS, WIDTH = 40, 32

# %%
from isthmus.train import config, recipe

print(recipe.read("quickstart").title)

job = config.load(
  "quickstart:smoke",
  [
    f"steps={STEPS}",
    f"save_every={STEPS}",
    f"model.width={WIDTH}",
    "batch_size=16",
  ],
)
for name, value in config.flatten(job).items():
  print(f"{name:32s} {value}")

# %% [markdown]
# A name that isn't there is an error, never ignored:

# %%
try:
  config.load("quickstart:smoke", ["model.widht=64"])
except config.ConfigError as error:
  print(error)
else:
  raise AssertionError("a misspelled field was accepted")

# %% [markdown]
# ## Training
#
# `run` trains in a folder. It writes records, a plot and checkpoints there, and
# goes on from the last checkpoint if you run it again in the same folder.

# %%
import pathlib
import tempfile

workdir = pathlib.Path(tempfile.mkdtemp()) / "first"
results = job.run(workdir)

for name, value in results.items():
  print(f"{name:24s} {value:.4g}")

# Guessing among 256 bytes costs 8 bits each.
assert results["eval/bits_per_byte"] < 6

# %%
import json

import matplotlib.pyplot as plt

records = [
  json.loads(line)
  for line in (workdir / "metrics.jsonl").read_text().splitlines()
]
curve = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(*zip(*curve, strict=True))
axes.set_xlabel("step")
axes.set_ylabel("nats a byte")
plt.show()

assert curve[-1][1] < curve[0][1]

# %% [markdown]
# ## Sampling
#
# `Generate` is another kind of job: it reads the checkpoint and writes text.
# After so short a training that is noise with the right letters; `make train`
# trains a model that writes something like code.

# %%
from isthmus.train.jobs import Generate

writer = Generate(
  model=job.model,
  tokenizer=job.data.tokenizer,
  prompt="def main(",
  length=60 if FAST else 300,
)
speed = writer.run(workdir)
print(f"\n{speed['tokens_per_second']:.0f} bytes a second, compiling included")

# %% [markdown]
# ## The parameters
#
# They are a tree of arrays, and their paths are part of the interface: the same
# names stand in checkpoints, sharding rules and exported files. `blocks` holds
# all layers, stacked along the first axis.

# %%
import jax
import jax.numpy as jnp

from isthmus.train.ckpt import restore_params
from isthmus.train.mesh import path_name

step, params = restore_params(workdir / "ckpt")
for path, leaf in jax.tree.leaves_with_path(params):
  print(f"{path_name(path):40s} {leaf.shape}")

count = sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"{count:,} parameters after {step} steps")
assert count == job.model.param_count()

# %% [markdown]
# The model is a Linen module, a frozen dataclass: what it holds is settings,
# and `apply` is a pure function of parameters and tokens. It returns logits and
# a dictionary of what happened on the way.

# %%
text = "import numpy as n"
ids = [job.data.tokenizer.start, *text.encode()]
logits, aux = job.model.apply({"params": params}, jnp.asarray([ids]))
print("logits", logits.shape, "hidden", aux["hidden"].shape)

likeliest = jax.lax.top_k(jax.nn.softmax(logits[0, -1]), 5)
for p, byte in zip(*map(list, likeliest), strict=True):
  print(f"{float(p):.3f}  {bytes([int(byte)])!r}")

assert logits.shape == (1, len(ids), job.model.vocab_size)

# %% [markdown]
# ## Attention by itself
#
# Mechanisms know no parameters: `attention` takes queries, keys and values,
# [batch, time, heads, width], and can be used without the rest of the library.
# Against its formula, written out:

# %%
from isthmus.attention import attention, explain

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
out = attention(q, k, v, causal=True)

with jax.default_matmul_precision("highest"):
  scores = jnp.einsum("btnd,bsnd->bnts", q, k) / 8**0.5
  scores = jnp.where(jnp.tri(16, dtype=bool), scores, -jnp.inf)
  expected = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores), v)

print(f"largest difference {jnp.abs(out - expected).max():.1e}")
# On a GPU float32 products are rounded to TF32 by default.
assert jnp.abs(out - expected).max() < 2e-2

# %% [markdown]
# `explain` says which implementation a call takes, and why the others refuse.

# %%
for row in explain(q, k, v, causal=True, return_lse=True):
  print(f"{row.name:6s} {row.verdict:8s} {row.reason}")

# %% [markdown]
# ## What next
#
# * `write_your_own_recipe.ipynb`, beside this one.
# * The command line does the same: `python -m train.main --config
#   quickstart:smoke --set model.width=64`.
# * `isthmus show quickstart` tells what the recipe reproduces and what was
#   measured.
