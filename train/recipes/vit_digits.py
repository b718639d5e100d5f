"""A small Vision Transformer on handwritten digits.

Link: none
Year: 2026
Family: vision
Core: nets/vision/vit.py
Reproduced: nothing published: a ViT whose layers may be computed backwards,
  `--set model.mode=reversible`, on the same data and seed.
Simplified: 8 x 8 images in patches of 2 x 2, width 64, depth 4; no
  augmentation.
Command: python -m train.main --config vit_digits
Claim: none
Result: accuracy 0.928 on 360 held-out digits, of two streams 0.953 (two CPU
  cores)
Measured: accuracy on 360 held-out digits 0.928, of two streams 0.953, with
  layers computed backwards as with all of them kept (`model.streams=2`), to
  the same loss of 0.148; seed 0 alone, so that 9 digits between one stream and
  two say little; two CPU cores; measured by us
Check: cpu: eval/accuracy = 0.928 +- 0.03; two CPU cores, Python 3.12,
  jax 0.11.2
"""

from isthmus.data.digits import Digits
from isthmus.nets.vision.vit import ViT
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.mesh import P
from isthmus.train.optim.chain import Optimizer
from isthmus.train.tasks.classify import Classify

RULES = (
  (r"attn/(q|k|v)/kernel$", P("fsdp", "model")),
  (r"attn/o/kernel$", P("model", "fsdp")),
  (r"mlp/up/kernel$", P("fsdp", "model")),
  (r"mlp/down/kernel$", P("model", "fsdp")),
)


def get_config(variant: str = "cpu") -> Fit:
  """`cpu`: a minute on two cores; `smoke`: seconds."""
  return choose({"cpu": _cpu, "smoke": _smoke}, variant)


def _cpu() -> Fit:
  return Fit(
    model=_net(width=64, depth=4, dropout=0.1),
    task=Classify(),
    data=Digits(),
    optimizer=Optimizer(learning_rate=2e-3, warmup=50, final=0.0),
    steps=800,
    batch_size=32,
    eval_batch_size=120,
    rules=RULES,
    log_every=20,
  )


def _smoke() -> Fit:
  return Fit(
    model=_net(width=32, depth=2, dropout=0.0),
    task=Classify(),
    data=Digits(),
    optimizer=Optimizer(learning_rate=1e-2, warmup=2),
    steps=8,
    batch_size=64,
    eval_batch_size=120,
    rules=RULES,
    log_every=1,
    save_every=4,
  )


def _net(*, width: int, depth: int, dropout: float) -> ViT:
  return ViT(
    classes=10,
    size=8,
    patch=2,
    width=width,
    depth=depth,
    num_heads=4,
    channels=1,
    dropout=dropout,
  )
