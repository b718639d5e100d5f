"""A language model trained by Adam with states of eight bits.

Link: https://arxiv.org/abs/2110.02861
Year: 2021
Family: optimisation
Core: train/optim/quant8.py
Reproduced: the optimiser: both moments as codes of a dynamic map with a scale
  for each block, embeddings in 32 bits, a decoder of 26M parameters on 33M
  bytes of Python's own source. Of the second moment its root is kept and small
  ones are not written as 0; `--set optimizer.scale.second=plain` is the
  published scheme, `--set optimizer.scale.first=linear
  optimizer.scale.second=linear` the naive one, and
  `--set optimizer.scale.codes.block=1073741824` has one scale a parameter.
Simplified: no stable embedding layer (the norm after the table), and one run,
  not yet the table of diverged shares.
Command: python -m train.main --config adam8bit
Claim: perplexity of a 209M model within noise of 32-bit Adam, with 75% less
  optimiser memory; paper's claim
Measured: not run
Check: none
"""

import functools

import jax.numpy as jnp

from isthmus.data.library import PythonLibrary
from isthmus.data.text import Text
from isthmus.nets.transformer import Decoder
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.mesh import P
from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.quant8 import scale_by_adam8bit
from isthmus.train.tasks.lm import NextToken

# One axis of each kernel stays whole: blocks lie along it.
RULES = (
  (r"attn/(q|k|v)/kernel$", P("fsdp", None)),
  (r"attn/o/kernel$", P(None, "fsdp")),
  (r"mlp/(gate|up)/kernel$", P("fsdp", None)),
  (r"mlp/down/kernel$", P(None, "fsdp")),
)


def get_config(variant: str = "full") -> Fit:
  """`full`: a GPU; `smoke`: seconds on a CPU."""
  return choose({"full": _full, "smoke": _smoke}, variant)


def _full() -> Fit:
  return Fit(
    model=Decoder(
      vocab_size=257,
      width=512,
      depth=8,
      num_heads=8,
      dtype=jnp.bfloat16,
    ),
    task=NextToken(segments=False),
    data=Text(
      corpus=PythonLibrary(eval_fraction=0.08), seq_len=1024, segments=False
    ),
    optimizer=_optimizer(learning_rate=1e-3, warmup=100, block=256),
    steps=2000,
    batch_size=16,
    rules=RULES,
    save_every=500,
  )


def _smoke() -> Fit:
  return Fit(
    model=Decoder(vocab_size=257, width=32, depth=2, num_heads=4),
    task=NextToken(),
    data=Text(corpus=PythonLibrary(eval_fraction=0.002), seq_len=64),
    optimizer=_optimizer(learning_rate=1e-2, warmup=2, block=32, min_size=0),
    steps=8,
    batch_size=8,
    rules=RULES,
    log_every=1,
    save_every=4,
  )


def _optimizer(*, learning_rate: float, warmup: int, **codes: int) -> Optimizer:
  return Optimizer(
    scale=functools.partial(
      scale_by_adam8bit, b2=0.95, codes=Codes(rules=RULES, **codes)
    ),
    learning_rate=learning_rate,
    warmup=warmup,
  )
