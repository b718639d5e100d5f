"""Tile sizes and pipeline depths of the Mosaic GPU kernels, by head width."""

import dataclasses

from isthmus.pallas.flash.mosaic_backward import BackwardConfig
from isthmus.pallas.flash.mosaic_forward import ForwardConfig


@dataclasses.dataclass(frozen=True)
class Configs:
  """One of each pass."""

  forward: ForwardConfig = ForwardConfig()
  queries: BackwardConfig = BackwardConfig(64, 4)
  keys: BackwardConfig = BackwardConfig(64, 4)


def configs(width: int, value_width: int) -> Configs:
  """What a call with these (padded) widths is compiled with."""
  if max(width, value_width) > 128:
    return Configs(
      ForwardConfig(64, 2), BackwardConfig(64, 1), BackwardConfig(64, 1)
    )
  return Configs()
