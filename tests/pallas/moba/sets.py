"""The sets of keys that queries read, written out one query at a time."""

import numpy as np


def runs(ids):
  """[(start, stop)] of the runs of equal ids in one row."""
  cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
  return list(zip(cuts[:-1], cuts[1:], strict=True))


def blocks(segments, block):
  """(start, stop, segment) of every block of one row, in order."""
  return [
    (i, min(i + block, stop), number)
    for number, (start, stop) in enumerate(segments)
    for i in range(start, stop, block)
  ]


def means(k, where):
  """Float64 means [g, heads, d] of blocks, rounded to the dtype of k."""
  wide = np.asarray(k, np.float64)
  return np.stack([wide[i:j].mean(0).astype(k.dtype) for i, j, _ in where])


def pick(scores, able, count):
  """The `count` indices of `able` of largest score; of equal ones the last."""
  return sorted(able, key=lambda j: (-scores[j], -j))[:count]


def choices(
  q,
  k,
  *,
  block,
  top_k,
  causal=True,
  segment_ids=None,
  q_positions=None,
  centroids=None,
):
  """Lists of (start, stop, index) that each (row, head, query) reads, cut.

  Yields (row, head, query, list).
  """
  (b, t, n, _), (s, heads) = q.shape, k.shape[1:3]
  q, k = np.asarray(q), np.asarray(k)
  for row in range(b):
    segments = [(0, s)]
    if segment_ids is not None:
      segments = runs(np.asarray(segment_ids)[row])
    where = blocks(segments, block)
    if centroids is None:
      middle = means(k[row], where)
    else:
      middle = np.asarray(centroids)[row].astype(q.dtype)
    middle = middle.astype(np.float64)
    places = np.arange(s - t, s)
    if q_positions is not None:
      places = np.asarray(q_positions)[row % len(q_positions)]
    for head in range(n):
      scores = (
        q[row, :, head].astype(np.float64) @ middle[:, head * heads // n].T
      )
      for i in range(t):
        mine = range(len(where))
        if segment_ids is not None:
          (number,) = (
            x for x, (start, stop) in enumerate(segments) if start <= i < stop
          )
          mine = [j for j in mine if where[j][2] == number]
        if not causal:
          found = pick(scores[i], mine, top_k)
          yield row, head, i, [(*where[j][:2], j) for j in found]
          continue
        p = int(places[i])
        past = [
          j for j in mine if where[j][1] <= p - (p - base(where, mine)) % block
        ]
        own = [j for j in mine if where[j][0] <= p < where[j][0] + block]
        found = own + pick(
          scores[i], [j for j in past if j not in own], top_k - 1
        )
        yield (
          row,
          head,
          i,
          [(where[j][0], min(where[j][1], p + 1), j) for j in found],
        )


def base(where, mine):
  """The first key of a segment."""
  return where[mine[0]][0]


def mask_of(q, k, **settings):
  """bool [b n t s]: what each query sees."""
  (b, t, n, _), s = q.shape, k.shape[1]
  mask = np.zeros((b, n, t, s), bool)
  for row, head, i, found in choices(q, k, **settings):
    for start, stop, _ in found:
      mask[row, head, i, start:stop] = True
  return mask


def table(q, k, *, width, **settings):
  """int [b n t width]: the indices of blocks, -1 past the last."""
  (b, t, n, _) = q.shape
  out = np.full((b, n, t, width), -1)
  for row, head, i, found in choices(q, k, **settings):
    index = [j for *_, j in found]
    out[row, head, i, : len(index)] = index
  return out
