"""A decoder's parameters from the named tensors of a file."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.data.weights.file import Weights, WeightsError
from isthmus.nets.transformer import Decoder

_BLOCKS = "stack/blocks/"
_FAR_OFF = 64
Convert = Callable[[np.ndarray], np.ndarray]


def assemble(
  model: Decoder,
  weights: Weights,
  names: Mapping[str, str],
  *,
  skip: Collection[str] = (),
  convert: Mapping[str, Convert] | None = None,
) -> dict[str, Any]:
  """Parameters of a decoder, of its `param_dtype`.

  Files hold matrices as [outputs, inputs]; kernels are [inputs, outputs].

  Args:
    model: says which parameters there are, and their shapes.
    weights: the file's tensors.
    names: the file's name of each parameter, by its path; those of blocks
      ("stack/blocks/attn/q/kernel") have a `{}` for the layer's number.
    skip: tensors of the file that aren't parameters, and are accounted for.
    convert: by path, applied to the tensor as the file has it.

  Returns:
    The tree that `model.apply` takes as `params`, on the default device.

  Raises:
    WeightsError: a tensor that is missing, one too many, one of another shape
      or one that isn't of floats; names it, and both shapes.

  Example:
    >>> from safetensors.numpy import save_file
    >>> from isthmus.data.weights.safetensors import SafetensorsFile
    >>> model = Decoder(vocab_size=16, width=8, depth=2, num_heads=2)
    >>> names, arrays = {}, {}
    >>> for path, shape in parameter_shapes(model).items():
    ...   names[path] = path.replace("blocks", "{}")
    ...   shape = shape[::-1] if path.endswith("kernel") else shape
    ...   for i in range(model.depth):
    ...     arrays[names[path].format(i)] = np.ones(shape, np.float32)
    >>> save_file(arrays, "w.safetensors")
    >>> params = assemble(model, SafetensorsFile("w.safetensors"), names)
    >>> params["stack"]["blocks"]["mlp"]["down"]["kernel"].shape
    (2, 64, 8)
  """
  _check_size(model, weights)
  shapes = parameter_shapes(model)
  wanted = {
    name: _stored(path, shape)
    for path, shape in shapes.items()
    for name in _names(path, names, model.depth)
  }
  _compare(weights, wanted, skip)
  params: dict[str, Any] = {}
  for path, shape in shapes.items():
    change = (convert or {}).get(path, _same)
    arrays = (
      _read(weights, name, path, change)
      for name in _names(path, names, model.depth)
    )
    if not path.startswith(_BLOCKS):
      _put(params, path, next(arrays), model.param_dtype)
    elif model.scan:
      stacked = np.empty((model.depth, *shape), jnp.dtype(model.param_dtype))
      for i, array in enumerate(arrays):
        stacked[i] = array
      _put(params, path, stacked, model.param_dtype)
    else:
      for i, array in enumerate(arrays):
        inner = path.replace("blocks", f"block_{i:02d}", 1)
        _put(params, inner, array, model.param_dtype)
  return params


def parameter_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
  """Shape of each parameter by its path, those of blocks for one layer.

  Example:
    >>> model = Decoder(vocab_size=16, width=8, depth=2, num_heads=2)
    >>> shapes = parameter_shapes(model)
    >>> shapes["embed/embedding"], shapes["stack/blocks/attn/q/kernel"]
    ((16, 8), (8, 8))
  """
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  stacked = model.copy(scan=True)
  variables = jax.eval_shape(stacked.init, jax.random.key(0), tokens)
  shapes = {}
  for parts, leaf in jax.tree.leaves_with_path(variables["params"]):
    path = jax.tree_util.keystr(parts, simple=True, separator="/")
    shapes[path] = leaf.shape[1 if path.startswith(_BLOCKS) else 0 :]
  return shapes


def _check_size(model: Decoder, weights: Weights) -> None:
  """Refuses sizes that no such file could mean, before anything is sized so.

  What is a little off is left to the comparison of the tensors, which knows
  their names.
  """
  elements = sum(math.prod(t.shape) for t in weights.tensors.values())
  tensors, parameters = len(weights.tensors), model.param_count()
  if model.depth > tensors or parameters > _FAR_OFF * max(elements, 1):
    raise WeightsError(
      f"{weights.path}: {tensors} tensors of {elements} elements are no"
      f" decoder of {model.depth} layers and {parameters} parameters"
    )


def _names(path: str, names: Mapping[str, str], depth: int) -> list[str]:
  if not path.startswith(_BLOCKS):
    return [names[path]]
  return [names[path].format(i) for i in range(depth)]


def _stored(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[::-1] if path.endswith("/kernel") else shape


def _compare(
  weights: Weights,
  wanted: Mapping[str, tuple[int, ...]],
  skip: Collection[str],
) -> None:
  def bad(names: list[str], what: str) -> WeightsError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return WeightsError(f"{weights.path} {what} {names[0]!r}{more}")

  missing = [n for n in wanted if n not in weights.tensors]
  if missing:
    raise bad(missing, "lacks the tensor")
  extra = [n for n in weights.names if n not in wanted and n not in skip]
  if extra:
    raise bad(extra, "has, but the decoder has no place for, the tensor")
  for name, shape in wanted.items():
    found = weights.tensors[name].shape
    if found != shape:
      raise WeightsError(
        f"{weights.path}: {name!r} has the shape {found}, not {shape}"
      )


def _read(
  weights: Weights, name: str, path: str, change: Convert
) -> np.ndarray:
  array = weights.read(name)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise WeightsError(f"{weights.path}: {name!r} is {array.dtype}, not floats")
  array = change(array)
  return array.T if path.endswith("/kernel") else array


def _put(params: dict[str, Any], path: str, array: np.ndarray, dtype: Any):
  *parents, last = path.split("/")
  for parent in parents:
    params = params.setdefault(parent, {})
  # jnp.asarray may borrow the file's bytes, which may change or go.
  params[last] = jnp.array(array, dtype)


def _same(array: np.ndarray) -> np.ndarray:
  return array
