"""What a device can do at most: the datasheet's figure and a measured one."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

#: Dense bf16 FLOP/s of a device, by the vendors' datasheets, without sparsity.
DATASHEET = {
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA L4": 121e12,
  "Tesla T4": 65e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}

#: Seconds of products after which a slow device has shown what it can do.
LONG = 0.5


def datasheet(device: jax.Device) -> float | None:
  """Dense bf16 FLOP/s by the datasheet, or None where it isn't listed.

  Example:
    >>> datasheet(jax.devices("cpu")[0]) is None
    True
  """
  return DATASHEET.get(device.device_kind)


@functools.cache
def measure(device: jax.Device, *, repeats: int = 5) -> float:
  """FLOP/s of a square matrix product on random data, the best of `repeats`.

  bf16 of width 8192 on an accelerator, float32 of width 1024 on a CPU: the
  rate that a training step, mostly matrix products, can come near. Measured
  once in a process, and no further after half a second of products.

  Example:
    >>> measure(jax.devices()[0], repeats=1) > 1e8
    True
  """
  accelerator = device.platform != "cpu"
  width = 8192 if accelerator else 1024
  inner = 8 if accelerator else 4
  dtype = jnp.bfloat16 if accelerator else jnp.float32
  draw = np.random.default_rng(0).standard_normal
  with jax.default_device(device):
    # By numpy, which has nothing to compile.
    a, b = (
      jnp.asarray(draw((width, width), np.float32) / width**0.5, dtype)
      for _ in range(2)
    )

    @jax.jit
    def chain(a, b):
      for _ in range(inner):
        a = a @ b
      return a

    chain(a, b).block_until_ready()
    times: list[float] = []
    while len(times) < repeats and sum(times) < LONG:
      start = time.perf_counter()
      chain(a, b).block_until_ready()
      times.append(time.perf_counter() - start)
  return inner * 2 * width**3 / min(times)
