"""Muon for the matrices of a network, NAdam for everything else."""

import re
from typing import Any

import jax
import optax

from isthmus.train.mesh import path_name


def scale_by_muon(
  *,
  matrices: str = "kernel$",
  beta: float = 0.95,
  ns_steps: int = 5,
  share: float = 0.3,
  b1: float = 0.9,
  b2: float = 0.95,
) -> optax.GradientTransformation:
  r"""Orthogonalises the momentum of matrices; scales the rest as NAdam does.

  For a kernel `[..., inputs, outputs]` with Nesterov momentum `M = U S V^T`,
  the update is near `sqrt(max(1, outputs / inputs)) U V^T`, by `ns_steps`
  Newton-Schulz steps; leading axes (stacked layers) are taken one by one. It
  is a `scale` of `Optimizer`, whose learning rate is then about ten times
  Adam's.

  Args:
    matrices: regex; parameters of two axes or more whose path it finds.
    beta: decay of the momentum.
    ns_steps: Newton-Schulz steps.
    share: Adam's learning rate as a share of Muon's.
    b1, b2: Adam's decays.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((4, 4))}
    >>> tx = scale_by_muon()
    >>> gradient = {"kernel": jnp.diag(jnp.array([1.0, 2.0, 4.0, 8.0]))}
    >>> update, _ = tx.update(gradient, tx.init(params), params)
    >>> size = jnp.abs(jnp.diag(update["kernel"]))  # all near 1
    >>> bool((size > 0.6).all() and (size < 1.3).all())
    True

  Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024; optax.contrib.muon.
  """

  def axes(path, leaf):
    if leaf.ndim < 2 or not re.search(matrices, path_name(path)):
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  def numbers(params: Any) -> Any:
    return jax.tree.map_with_path(axes, params)

  both = optax.contrib.muon(
    1.0,
    ns_steps=ns_steps,
    beta=beta,
    adam_b1=b1,
    adam_b2=b2,
    adam_learning_rate=share,
    muon_weight_dimension_numbers=numbers,
  )
  # optax's descends; the chain that this is a part of does so itself.
  return optax.chain(both, optax.scale(-1.0))
