"""Parameters from tensors: placed by name, transposed, none left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.data.weights.file import Tensor, Weights, WeightsError
from isthmus.nets.lm.assembly import assemble, parameter_shapes
from isthmus.nets.stack import unstack_layers
from isthmus.nets.transformer import Decoder

MODEL = Decoder(vocab_size=7, width=4, depth=3, num_heads=2, hidden=6)


class Held(Weights):
  """Tensors in memory."""

  def __init__(self, arrays):
    self.path, self.metadata, self.arrays = "memory", {}, arrays
    self.tensors = {
      n: Tensor(x.shape, str(x.dtype), 0, x.nbytes) for n, x in arrays.items()
    }

  def read(self, name):
    return self.arrays[name]


def held(model):
  """Names as the parameters' paths have them, layers by number."""
  names, arrays, rng = {}, {}, np.random.default_rng(0)
  for path, shape in parameter_shapes(model).items():
    names[path] = path.replace("stack/blocks", "{}")
    stored = shape[::-1] if path.endswith("kernel") else shape
    for i in range(model.depth if path.startswith("stack") else 1):
      arrays[names[path].format(i)] = rng.standard_normal(stored)
  return names, arrays


def test_parameter_shapes_are_the_models():
  for model in (MODEL, MODEL.copy(scan=False, tied=False)):
    shapes = parameter_shapes(model)
    assert shapes["stack/blocks/attn/q/kernel"] == (4, 4)
    assert shapes["stack/blocks/mlp/down/kernel"] == (6, 4)
    assert shapes["embed/embedding"] == (7, 4)
    assert ("head/kernel" in shapes) == (not model.tied)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_in_its_place(tied):
  model = MODEL.copy(tied=tied)
  names, arrays = held(model)
  params = assemble(model, Held(arrays), names)
  tokens = jnp.zeros((1, 2), jnp.int32)
  like = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, like
  )
  assert jax.tree.all(same)
  blocks = params["stack"]["blocks"]
  for i in range(3):
    for part, name in (("attn", "o"), ("mlp", "gate")):
      np.testing.assert_array_equal(
        blocks[part][name]["kernel"][i],
        arrays[f"{i}/{part}/{name}/kernel"].T.astype(np.float32),
      )
  flat = assemble(model.copy(scan=False), Held(arrays), names)
  apart = unstack_layers(params)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, flat, apart))


def test_converted_and_skipped():
  names, arrays = held(MODEL)
  arrays["more"] = np.zeros(3)
  with pytest.raises(WeightsError, match="memory has, .* the tensor 'more'"):
    assemble(MODEL, Held(arrays), names)
  double = {"norm/scale": lambda x: 2 * x}
  params = assemble(MODEL, Held(arrays), names, skip=["more"], convert=double)
  want = (2 * arrays["norm/scale"]).astype(np.float32)
  np.testing.assert_array_equal(params["norm"]["scale"], want)


def test_far_off_sizes():
  names, arrays = held(MODEL)
  for change in (
    {"depth": 30},
    {"depth": 1 << 40},
    {"width": 1 << 40},
    {"hidden": 1 << 40},
  ):
    with pytest.raises(WeightsError, match="tensors of .* are no decoder of"):
      assemble(MODEL.copy(**change), Held(arrays), names)
  lacking = {n: x for n, x in arrays.items() if n != "1/attn/v/kernel"}
  with pytest.raises(WeightsError, match="lacks the tensor '1/attn/v/kernel'"):
    assemble(MODEL, Held(lacking), names)
