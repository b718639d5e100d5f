"""Settings of reduced scores."""

import pytest

from isthmus.pallas.scores.api import Options, offset

pytestmark = pytest.mark.once


def test_queries_stand_at_the_last_keys():
  assert offset(3, 10, Options(1, queries="rows")) == 7
  assert offset(10, 3, Options(1, queries="columns")) == 7


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"side": 24}, "side is 24"),
    ({"side": 0}, "side is 0"),
    ({"side": 8, "reduce": "mean"}, "reduce is 'mean'"),
    ({"side": 8, "queries": "keys"}, "queries is 'keys'"),
  ],
)
def test_what_there_is_not_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    Options(**settings)
