"""Settings of importance."""

import pytest

from isthmus.pallas.importance.api import Options

pytestmark = pytest.mark.once


def test_equal_settings_are_one_static_argument():
  assert hash(Options(False, 0.5)) == hash(Options(causal=False, scale=0.5))
  assert len({Options(), Options(False), Options(scale=0.5), Options()}) == 3
