"""Settings of reduced logits."""

import pytest

from isthmus.pallas.scores.api import Options

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"side": 24}, "side is 24"),
    ({"side": 0}, "side is 0"),
    ({"side": 8, "reduce": "mean"}, "reduce is 'mean'"),
  ],
)
def test_what_there_is_not_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    Options(**settings)
