"""Facts hidden in long text, of any tokens, and asked for at its end."""

import dataclasses

import numpy as np
from jaxtyping import Int

from isthmus.data.tokenizer import Encoder

#: Names that facts are about, the first ones first.
NAMES = ("Oslo", "Lima", "Rome", "Cairo", "Delhi", "Paris", "Kyoto", "Quito")
_LINE = "\n# The secret number of {name} is "


@dataclasses.dataclass(frozen=True)
class Facts:
  """Hides a number for each of some names, and asks for all of them.

  Fact i of n stands at (i + 1/2) / n of the text, in a line of its own; the
  questions are the same lines again, in an order that is drawn, each with its
  answer. Where the next token can be known from the fact, it is asked for.

  Args:
    tokenizer: of the text.
    count: facts, at most as many as `NAMES`.
    digits: of a number.

  Raises:
    ValueError: another count, no digits; when called, a row that is too short.

  Example:
    >>> from isthmus.data.tokenizer import Bytes
    >>> facts = Facts(Bytes(), count=1, digits=2)
    >>> hay = np.full(90, 97, np.int32)
    >>> tokens, asked = facts(hay, np.random.default_rng(0))
    >>> print(Bytes().decode(tokens))
    aaaaaaaaaa
    # The secret number of Oslo is 86
    aaaaaaaaaaa
    # The secret number of Oslo is 86
    >>> Bytes().decode(tokens[asked > 0])
    '86'
  """

  tokenizer: Encoder
  count: int = 8
  digits: int = 5

  def __post_init__(self):
    if not 1 <= self.count <= len(NAMES):
      raise ValueError(f"count is {self.count}; it lies in [1, {len(NAMES)}]")
    if self.digits < 1:
      raise ValueError(f"digits is {self.digits}; it is at least 1")

  def __call__(
    self, tokens: Int[np.ndarray, "t"], rng: np.random.Generator
  ) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "t"]]:
    """(a row as long as `tokens`, i where the answer to fact i - 1 stands)."""
    lines = [self._tokens(_LINE.format(name=n)) for n in NAMES[: self.count]]
    drawn = rng.integers(0, 10, (self.count, self.digits))
    answers = [self._tokens("".join(map(str, row))) for row in drawn]
    end = self._tokens("\n")
    facts = [
      np.concatenate([line, answer, end])
      for line, answer in zip(lines, answers, strict=True)
    ]
    asked = []
    for i in rng.permutation(self.count):
      asked.append((lines[i], np.zeros(len(lines[i]), np.int32)))
      asked.append((answers[i], np.full(len(answers[i]), i + 1, np.int32)))
    taken = sum(map(len, facts)) + sum(len(x) for x, _ in asked)
    room = len(tokens) - taken
    if room < 0:
      raise ValueError(
        f"{self.count} facts and questions are {taken} tokens; the row has"
        f" {len(tokens)}"
      )
    cuts = [round((i + 0.5) / self.count * room) for i in range(self.count)]
    parts = np.split(tokens[:room], cuts)
    body = [parts[0]]
    for fact, part in zip(facts, parts[1:], strict=True):
      body += [fact, part]
    row = np.concatenate([*body, *(x for x, _ in asked)])
    marks = [np.zeros(room + sum(map(len, facts)), np.int32)]
    return (
      row.astype(tokens.dtype),
      np.concatenate([*marks, *(mark for _, mark in asked)]),
    )

  def _tokens(self, text: str) -> Int[np.ndarray, "t"]:
    [(tokens, _)] = self.tokenizer.encode([("", text)])
    return tokens.astype(np.int32)
