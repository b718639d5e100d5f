"""What can be weighed."""

import pytest

from isthmus.pallas.keep.api import Options


def test_a_weight_that_is_none_is_refused():
  with pytest.raises(ValueError, match="weigh is 'ones', not of 'one'"):
    Options("ones")
  assert Options("softmax") == Options("softmax") != Options("value")
