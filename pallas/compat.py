"""Where the kernels meet interfaces of jax that move between releases."""

import contextlib
from typing import Any

import jax

# Part of the key of jit's cache, as a ContextVar is not.
_interpreting = jax.make_user_context("")


def has_mosaic() -> bool:
  """Whether this jax has the Mosaic GPU interface that the kernels use.

  Example:
    >>> has_mosaic() == (jax.__version_info__ >= (0, 11))
    True
  """
  return jax.__version_info__ >= (0, 11)


def interpreting(kind: str = "gpu") -> bool:
  """Whether kernels are interpreted on the CPU.

  Args:
    kind: those of Mosaic for "gpu", or for "tpu".

  Example:
    >>> interpreting()
    False
  """
  return _interpreting.value == kind


def store(ref: Any, value: Any) -> None:
  """`ref[...] = value`, to the GPU's memory, however few bytes a thread has.

  jax 0.12 wants it said that these may be fewer than 4.

  Args:
    ref: of a kernel.
    value: of its shape and dtype.

  Example:
    >>> import jax.experimental.pallas.mosaic_gpu as plgpu
    >>> x = jax.ShapeDtypeStruct((128,), "int8")
    >>> copy = plgpu.kernel(lambda x, y: store(y, x[...]), out_type=x)
    >>> jax.eval_shape(copy, x).dtype
    dtype('int8')
  """
  import jax.experimental.pallas.mosaic_gpu as plgpu

  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


@contextlib.contextmanager
def interpreted(kind: str = "gpu"):
  """`with interpreted():` runs Mosaic GPU kernels on the CPU, for tests.

  Every warpgroup is simulated: seconds for what a GPU does in microseconds.

  Args:
    kind: "gpu"; or "tpu" for the kernels of TPUs, one program after another.

  Raises:
    NotImplementedError: for GPUs, jax is older than 0.11, which brought it.

  Example:
    >>> with interpreted():
    ...   interpreting()
    True
  """
  if kind == "tpu":
    with _interpreting(kind):
      yield
    return
  if not has_mosaic():
    raise NotImplementedError(
      f"jax {jax.__version__} can't interpret GPU kernels; 0.11 can"
    )
  import jax.experimental.pallas.mosaic_gpu as plgpu

  with _interpreting(kind):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
      yield
