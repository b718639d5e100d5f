"""What is measured: shapes, masks, and how many FLOPs they count for.

Masks come from NumPy under a fixed seed, so that a peer in another process
makes the same ones; `Case.checksum` says whether it did.
"""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np

#: Tokens of a query block and of a key block in the sparse cases.
BLOCK = 128
#: Share of the blocks below the diagonal that each sparse case keeps. As the
#: blocks above it are none, the density tends to half of that.
SPARSE = {"sparse8": 1 / 4, "sparse16": 1 / 8, "sparse32": 1 / 16}
#: Every mask there is, by the name that the command takes.
MASKS = ("dense", "causal", "documents", *SPARSE)
#: FLOPs of a pass over those of the forward pass: two products against five.
PASSES = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
#: Documents in a row of the documents case.
DOCUMENTS = 8

_SEED = 20


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem: self-attention of `batch` rows under a mask.

  Attributes:
    mask: one of `MASKS`. "documents" is causal within each document.
    batch: rows.
    length: tokens of a row, queries and keys alike.
    heads: query heads, and as many key heads.
    width: of a head.

  Example:
    >>> case = Case("causal", batch=1, length=32768, heads=16, width=128)
    >>> case.label, case.flops("fwd") / 1e12
    ('causal', 4.398046511104)
  """

  mask: str
  batch: int
  length: int
  heads: int
  width: int

  def __post_init__(self):
    if self.mask not in MASKS:
      raise ValueError(f"case {self.mask!r}; there are {', '.join(MASKS)}")
    for name in ("batch", "length", "heads", "width"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
    if self.sparse and self.length % BLOCK:
      raise ValueError(
        f"{self.mask} has blocks of {BLOCK} tokens, and {self.length} tokens "
        "are not a multiple"
      )
    if self.mask == "documents" and self.length < 2 * DOCUMENTS:
      raise ValueError(
        f"{DOCUMENTS} documents want {2 * DOCUMENTS} tokens, not {self.length}"
      )

  @property
  def sparse(self) -> bool:
    """Whether it has block lists."""
    return self.mask in SPARSE

  @property
  def label(self) -> str:
    """Its name for a reader: "sparse 1/8"."""
    return self.mask.replace("sparse", "sparse 1/")

  @property
  def shape(self) -> str:
    """Its sizes for a reader."""
    return f"B{self.batch} S{self.length} H{self.heads} D{self.width}"

  @functools.cached_property
  def density(self) -> float:
    """Seen pairs over all; the diagonal counts as half where it is cut."""
    if self.mask == "dense":
      return 1.0
    if self.mask == "causal":
      return 0.5
    if self.sparse:
      return float(self.blocks.mean())
    sizes = np.diff(self.document_starts, axis=1).astype(np.float64)
    return float((sizes**2).sum() / self.batch / self.length**2 / 2)

  def flops(self, which: str) -> float:
    """FLOPs of a pass: 4 b t s n d density, times that of `PASSES`."""
    pairs = self.batch * self.length**2 * self.heads * self.density
    return 4 * pairs * self.width * PASSES[which]

  @functools.cached_property
  def blocks(self) -> np.ndarray:
    """Bool [b, n, blocks, blocks]: the blocks that queries see whole.

    Each head has its own: of the i blocks before the i-th, ceil(keep i) at
    random, and the i-th itself.
    """
    if not self.sparse:
      raise ValueError(f"{self.mask} has no blocks")
    size, keep = self.length // BLOCK, SPARSE[self.mask]
    random = np.random.default_rng(_SEED)
    scores = random.random((self.batch, self.heads, size, size), np.float32)
    row, column = np.arange(size)[:, None], np.arange(size)
    scores[..., column >= row] = -1
    order = np.argsort(-scores, axis=-1, kind="stable")
    seen = np.zeros(scores.shape, bool)
    wanted = np.ceil(row * keep).astype(int)
    taken = np.broadcast_to(column < wanted, seen.shape)
    np.put_along_axis(seen, order, taken, axis=-1)
    return seen | np.eye(size, dtype=bool)

  @functools.cached_property
  def document_starts(self) -> np.ndarray:
    """Int [b, documents + 1]: where documents begin, and the end."""
    random = np.random.default_rng(_SEED)
    cuts = [
      np.sort(random.choice(self.length - 1, DOCUMENTS - 1, replace=False)) + 1
      for _ in range(self.batch)
    ]
    rows = [np.concatenate([[0], c, [self.length]]) for c in cuts]
    return np.stack(rows).astype(np.int64)

  @functools.cached_property
  def documents(self) -> np.ndarray:
    """int32 [b, t]: the document of each token."""
    tokens = np.arange(self.length)
    rows = [np.searchsorted(r, tokens, "right") for r in self.document_starts]
    return (np.stack(rows) - 1).astype(np.int32)

  @functools.cached_property
  def checksum(self) -> int:
    """CRC-32 of the blocks or documents; 0 for the cases that have none."""
    if self.sparse:
      return zlib.crc32(np.packbits(self.blocks).tobytes())
    if self.mask == "documents":
      return zlib.crc32(self.documents.tobytes())
    return 0

  def as_dict(self) -> dict[str, Any]:
    """Its fields, for JSON; `Case(**fields)` is the way back."""
    return dataclasses.asdict(self)


def grid(
  masks: tuple[str, ...],
  lengths: tuple[int, ...],
  widths: tuple[int, ...],
  *,
  tokens: int,
  hidden: int,
  batch: int | None = None,
) -> list[Case]:
  """All combinations, at about `tokens` tokens and `hidden` channels each.

  The batch is tokens / length (at least 1) unless it is given, the heads are
  hidden / width.

  Raises:
    ValueError: a width that doesn't divide `hidden`, or a case that can't be.

  Example:
    >>> for case in grid(("causal",), (8192,), (64, 128), tokens=32768,
    ...                  hidden=2048):
    ...   print(case.shape)
    B4 S8192 H32 D64
    B4 S8192 H16 D128
  """
  for width in widths:
    if hidden % width:
      raise ValueError(f"{hidden} channels don't split into heads of {width}")
  return [
    Case(
      mask,
      max(1, tokens // length) if batch is None else batch,
      length,
      hidden // width,
      width,
    )
    for mask in masks
    for width in widths
    for length in lengths
  ]


def must() -> list[Case]:
  """The shapes that speed is promised for: 32k and 8k tokens, D 128 and 64.

  Example:
    >>> len(must()), sorted({case.shape for case in must()})[0]
    (12, 'B1 S32768 H16 D128')
  """
  shapes = [(1, 32768, 16, 128), (4, 8192, 16, 128), (4, 8192, 32, 64)]
  return [Case(m, *shape) for shape in shapes for m in ("causal", *SPARSE)]
