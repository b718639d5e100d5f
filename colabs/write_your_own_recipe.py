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
# # Write your own recipe
#
# One file is a system: it builds a model, a task, data and an optimiser, and
# returns the job that trains them. Here it is a perceptron on handwritten
# digits; a paper's idea would take the perceptron's place.

# %%
# @title Install (on Colab; elsewhere this does nothing)
import os
import sys

# A clone of the repository, or what pip takes for one (git+https://...).
REPOSITORY = "/content/isthmus"  # @param {type:"string"}

if "google.colab" in sys.modules:
  get_ipython().run_line_magic("pip", f"install -q '{REPOSITORY}[colab]'")

# %%
from isthmus.train import doctor

for line in doctor.summary():
  print(line)

# %% [markdown]
# ## The file
#
# `get_config(variant)` is all that is asked of it. Nothing is registered, and
# there is no second file of settings: what the function builds are the
# settings. `smoke` is by custom the variant that takes seconds.

# %%
import pathlib
import tempfile

RECIPE = '''"""A residual perceptron on handwritten digits."""

import flax.linen as nn

from isthmus.data.digits import Digits
from isthmus.nets.mlp import Mlp
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.optim.chain import Optimizer
from isthmus.train.tasks.classify import Classify


class Perceptron(nn.Module):
  """Logits [b, 10] of images [b, y, x, 1]."""

  hidden: int = 64

  @nn.compact
  def __call__(self, image, *, train=False):
    x = image.reshape(image.shape[0], -1)
    x = x + Mlp(self.hidden, name="mlp")(x, train=train)
    return nn.Dense(10, name="head")(x)


def get_config(variant="full"):
  """`full`: the whole run; `smoke`: seconds on a CPU."""
  return choose(
    {"full": lambda: _fit(steps=600), "smoke": lambda: _fit(steps=60)}, variant
  )


def _fit(steps):
  return Fit(
    model=Perceptron(),
    task=Classify(),
    data=Digits(),
    optimizer=Optimizer(learning_rate=1e-2, warmup=20),
    steps=steps,
    batch_size=64,
    log_every=5,
  )
'''

folder = pathlib.Path(tempfile.mkdtemp())
path = folder / "digits.py"
_ = path.write_text(RECIPE)

# %% [markdown]
# ## Running it
#
# A recipe is loaded by name if it is the library's, by path if it is yours. The
# command line does the same: `python -m train.main --config digits.py:smoke`.

# %%
from isthmus.train import config

job = config.load(f"{path}:smoke")
results = job.run(folder / "smoke")
print(f"held-out accuracy {results['eval/accuracy']:.3f}")

assert results["eval/accuracy"] > 0.5  # guessing gives 0.1

# %% [markdown]
# ## Two widths
#
# Whatever the recipe builds can be changed without touching the file, with
# `--set model.hidden=4` on the command line or a list of such texts here. What
# does not fit is refused when the job is built, before anything runs.

# %%
FAST = bool(os.environ.get("ISTHMUS_FAST"))  # tiny sizes, for the tests

NARROW = 1  # @param {type:"integer"}
WIDE = 128  # @param {type:"integer"}
STEPS = 300  # @param {type:"integer"}
if FAST:
  STEPS = 40

# %%
import json


def train(hidden):
  """The loss curve [(step, loss), ...] and the results of one width."""
  job = config.load(str(path), [f"model.hidden={hidden}", f"steps={STEPS}"])
  workdir = folder / f"hidden{hidden}"
  results = job.run(workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  curve = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
  return curve, results


runs = {hidden: train(hidden) for hidden in (NARROW, WIDE)}

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3))
for hidden, (curve, results) in runs.items():
  label = f"hidden {hidden}: {results['eval/accuracy']:.3f} held out"
  axes.plot(*zip(*curve, strict=True), label=label)
axes.set_xlabel("step")
axes.set_ylabel("cross-entropy, nats")
axes.set_yscale("log")
axes.legend()
plt.show()

assert all(curve[-1][1] < curve[0][1] for curve, _ in runs.values())

# %% [markdown]
# One seed each says little about two numbers that are close. A `Study` runs a
# grid of jobs under several seeds and reports intervals.
#
# ## The trained parameters
#
# A safetensors file holds arrays under their paths and nothing that could run;
# other libraries read it. `isthmus export` is the command for it.

# %%
import jax
import numpy as np

from isthmus.train.ckpt import restore_params
from isthmus.train.export import export_safetensors, load_safetensors

step, params = restore_params(folder / f"hidden{WIDE}" / "ckpt")
file = folder / "digits.safetensors"
export_safetensors(file, params, metadata={"step": str(step)})
loaded = load_safetensors(file)
print(f"{file.name}: {file.stat().st_size:,} bytes")
for name, leaf in jax.tree.leaves_with_path(loaded):
  print(f"{jax.tree_util.keystr(name):28s} {leaf.shape}")

_ = jax.tree.map(np.testing.assert_array_equal, loaded, params)

# %% [markdown]
# The file is enough to use the model: a few held-out digits, and what it takes
# them for.

# %%
model = config.load(str(path), [f"model.hidden={WIDE}"]).model
held_out = job.data.open("eval").take(np.arange(6))
logits = model.apply({"params": loaded}, held_out["image"])
guesses = np.argmax(logits, axis=-1)

figure, axes = plt.subplots(1, 6, figsize=(6, 1.6))
for axis, image, guess in zip(axes, held_out["image"], guesses, strict=True):
  axis.imshow(image[..., 0], cmap="gray_r")
  axis.set_title(str(guess))
  axis.axis("off")
plt.show()

assert np.mean(guesses == held_out["label"]) > 0.5

# %% [markdown]
# ## Into the library
#
# `CONTRIBUTING.md` shows the rest: the file goes to `train/recipes/`, its
# docstring says what it reproduces and what was measured, and its name becomes
# one entry of a list. The common suites then run it, resume it and split it
# over eight devices.
