"""The recipe of prefills over chosen blocks: its variants."""

import pytest

from isthmus.attention.bench.ways import WAYS
from isthmus.attention.sdpa import attention
from isthmus.data.recall import NAMES
from isthmus.data.text import Text
from isthmus.data.tokenizer import Bytes
from isthmus.train.recipes import pbs_attn, proxy_attn
from isthmus.train.recipes import sparse_prefill as recipe

pytestmark = pytest.mark.once


def test_variants_need_no_weights_to_be_built():
  full, small = recipe.get_config("full"), recipe.get_config("small")
  assert max(full.contexts) == 8192 and small.block == 64
  assert set(WAYS) > set(full.levels) > set(small.levels)
  assert full.facts <= len(NAMES)


def test_the_text_has_the_rows_that_are_read():
  """In tokens of four bytes; SmolLM2's are shorter on this text."""
  opened = Text(recipe.CORPUS, Bytes(), seq_len=4 * 8192, segments=False)
  have = len(opened.open("eval"))
  for module in (recipe, pbs_attn, proxy_attn):
    job = module.get_config("full")
    assert job.corpus == recipe.CORPUS and max(job.contexts) == 8192
    assert have >= 2 * job.rows


def test_speed_is_of_the_shape_that_is_promised():
  job = recipe.get_config("speed")
  assert job.shape == "H32/8 D128" and job.seconds <= 500
  # What is promised is measured first.
  assert job.lengths[:2] == (131072, 262144) and len(job.lengths) == 4
  # 8 kv heads are those of three layers of SmolLM2, three each.
  assert len(job.layers) == 3 and max(job.layers) < 30


def test_deep_is_of_the_sizes_of_llama():
  job = recipe.get_config("deep")
  model = job.model(attention)
  assert model.sizes == (32, 8, 128, 14336)
  assert model.param_count() == 8030261248  # as its authors' file has
  assert job.source == "read" and max(job.arrays.lengths) == 131072
