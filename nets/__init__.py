"""Linen modules and pure functions over parameters."""

if __name__ != "isthmus.nets":  # imported from a checkout as plain `nets`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  from isthmus.nets.mbconv import MBConv, SqueezeExcite
  from isthmus.nets.mlp import (
    GatedMlp,
    HourglassMlp,
    Mlp,
    MlpBlock,
    ResidualMlp,
  )
  from isthmus.nets.norm import RMSNorm
  from isthmus.nets.rotary import (
    LinearScaling,
    Llama3Scaling,
    rope,
    rotation,
  )
  from isthmus.nets.stack import Stack, stack_layers, unstack_layers
  from isthmus.nets.transformer import Attention, Block, Decoder

  __version__ = version("isthmus")
  __all__ = [
    "Attention",
    "Block",
    "Decoder",
    "GatedMlp",
    "HourglassMlp",
    "LinearScaling",
    "Llama3Scaling",
    "MBConv",
    "Mlp",
    "MlpBlock",
    "RMSNorm",
    "ResidualMlp",
    "SqueezeExcite",
    "Stack",
    "rope",
    "rotation",
    "stack_layers",
    "unstack_layers",
  ]
