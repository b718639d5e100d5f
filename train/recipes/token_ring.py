"""TokenRing beside rings of keys: bytes, and where the links set the pace.

Link: https://arxiv.org/abs/2412.20501
Year: 2024
Family: attention
Core: attention/simulate.py
Reproduced: bytes of every step in both directions, forward and backward, of
  TokenRing (queries one way, results the other), rings of keys one way and
  both, all-gather and Ulysses, against heads per key head and up to 4096
  devices; the time of a step is that of its compute or of the busier
  direction, whichever is longer.
Simplified: arithmetic, no measurement: one rate of attention at all sizes, no
  contention, no latency unless set; rates are round figures for an H100 with a
  400 Gb/s adapter. TokenRing's authors have no backward pass; its bytes are
  those of ours. What `python -m
  isthmus.attention.bench.rings --out DIR` measures goes onto the plot with
  `--set measured=DIR/rings.json`. On two devices a ring of keys uses both
  directions too; what TokenRing claims is of more.
Command: python -m train.main --config token_ring
Claim: on four A10s, 32 heads of width 128 and 24,000 tokens, a step takes 3.5
  to 4.6 ms, against 7.6 of a ring of keys; paper's claim
Result: two GPUs are 1.95 times one at 128K tokens, forward and backward, four
  3.77; 16 heads: TokenRing 1.04 times a ring of keys on four (H200)
Measured: `attention.bench.rings --dim 128 --passes fwd+bwd --quick`, causal,
  bfloat16, H200s of one host behind an NVLink switch against one of them, jax
  0.11.2, ms and speed at 131,072 tokens; the README has other lengths. Two
  GPUs, 16 heads on 16 (474.6 on one): token_ring (chosen) 243.7, 1.95; kv_ring
  244.7, 1.94; kv_ring_bidir 245.2, 1.94; ulysses 246.7, 1.92; all_gather 247.9,
  1.91. 32 on 8 (969.0): kv_ring (chosen) 493.7, 1.96; all_gather 493.3, 1.96;
  kv_ring_bidir 495.5, 1.96; token_ring 499.6, 1.94; ulysses 502.9, 1.93. At
  262,144 the chosen ones are 1.96 and 1.99. Four, 16 on 16 (472.8): ulysses
  (chosen) 125.6, 3.77; token_ring 129.2, 3.66; kv_ring_bidir 133.2, 3.55;
  kv_ring 134.3, 3.52. 32 on 8 (958.9): ulysses (chosen) 252.9, 3.79;
  kv_ring_bidir 251.1, 3.82. token_ring against kv_ring on four, 16 heads: 1.06
  at 65,536, 1.04 at 131,072, 1.01 at 524,288 (1943 and 1954 ms, 3.90 and 3.88
  times one GPU; in another run token_ring 1935, ulysses, the chosen one, 1920,
  3.95 times one's 7591). 32 on 8 at 262,144: ulysses 983, 3.94; kv_ring_bidir
  975, 3.98; kv_ring 977, 3.97; token_ring 982, 3.95 (3878 on one). What four
  send by itself, ms: ulysses 1.5, token_ring 5.1, kv_ring 6.8, kv_ring_bidir
  8.0: TokenRing gains by fewer bytes, not by using both directions, which a
  switch doesn't have apart. Of a call on two GPUs 1 to 4% goes into sends,
  waiting included, and 15 to 44% of that is under kernels. By `full` with
  `length=131072 flops=5.1e14 ahead=4.5e11 behind=4.5e11 links=one`, whose plot
  the gallery has, what was measured is 1.00 to 1.01 of the model's time (16
  heads, two GPUs), 1.02 to 1.03 (32, two), 1.02 to 1.10 (16, four) and 1.03 to
  1.04 (32, four). Eight GPUs: not run; measured by us
Check: smoke: group_break_even/kv_ring = 2.64 +- 0.01,
  group_break_even/kv_ring_bidir = 1.32 +- 0.01; arithmetic
"""

from isthmus.train.config import choose
from isthmus.train.rings import Rings


def get_config(variant: str = "full") -> Rings:
  """`full`: up to 4096 devices, half a minute on a CPU; `smoke`: seconds."""
  return choose({"full": _full, "smoke": _smoke}, variant)


def _full() -> Rings:
  return Rings(devices=tuple(2**i for i in range(1, 13)))


def _smoke() -> Rings:
  return Rings(length=2**17, devices=(2, 4, 8, 16))
