"""Attention over chosen blocks: mechanisms, caches, and their projections."""

# Imported from a checkout as plain `attention`:
if __name__ != "isthmus.attention":
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  from isthmus.attention.block_mask import BlockMask
  from isthmus.attention.cache import KVCache
  from isthmus.attention.decode import decode, decode_step
  from isthmus.attention.kconv import KeyConv, kconv
  from isthmus.attention.mask import EMPTY
  from isthmus.attention.merge import add_sinks, merge
  from isthmus.attention.moba import moba
  from isthmus.attention.module import Attention
  from isthmus.attention.permute import pbs_attention
  from isthmus.attention.proxy import proxy_attention
  from isthmus.attention.reshape import rettention
  from isthmus.attention.ring import ring_attention
  from isthmus.attention.schedule import choose_schedule
  from isthmus.attention.sdpa import attention, explain, report, save_attention
  from isthmus.attention.select import select_attention

  __version__ = version("isthmus")
  __all__ = [
    "EMPTY",
    "Attention",
    "BlockMask",
    "KVCache",
    "KeyConv",
    "add_sinks",
    "attention",
    "choose_schedule",
    "decode",
    "decode_step",
    "explain",
    "kconv",
    "merge",
    "moba",
    "pbs_attention",
    "proxy_attention",
    "report",
    "rettention",
    "ring_attention",
    "save_attention",
    "select_attention",
  ]
