"""Dropout whose mask is a hash of (key, row, column).

A few integer operations an entry, where a random generator takes many more; the same whatever the mesh, and the same
whether an array is made as a whole or in blocks, which is what lets attention drop weights that it never stores.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct


@struct.dataclass
class Drop:
  """What to drop: `words` (2,) uint32 are the key, `rate` is in (0, 1)."""

  words: jax.Array
  rate: float = struct.field(pytree_node=False)

  def __call__(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability `rate` and scales the others so that the mean stays.

    Args:
      x: (..., K), columns 0 to K - 1 of its rows.
      rows: uint32, broadcasts to x.shape[:-1]: the number of each row. Equal numbers drop equal columns.
    """
    columns = (jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)).reshape((1,) * rows.ndim + (-1,))
    bits = scramble(scramble(rows + self.words[0])[..., None] ^ (columns + self.words[1]))
    least = jnp.uint32(min(round(self.rate * 2 ** 32), 2 ** 32 - 1))
    return jnp.where(bits >= least, x * (1 / (1 - self.rate)), 0).astype(x.dtype)

  def again(self, number: int) -> "Drop":
    """Returns a Drop with a key of its own, from 1; number 0 is this one."""
    return dataclasses.replace(self, words=scramble(self.words + jnp.uint32(number))) if number else self


def scramble(x: jax.Array) -> jax.Array:
  """Returns uint32 of which every bit depends on every bit of x (a bijection; the constants are Wellons' lowbias32)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def draw_drop(module: nn.Module, rate: float, train: bool) -> Drop | None:
  """Returns a fresh Drop from a module's "dropout" stream; None where nothing is dropped, and then asks for no key."""
  if not train or rate == 0:
    return None
  return Drop(jax.random.bits(module.make_rng("dropout"), (2,), jnp.uint32), rate)


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Drops entries of x (..., K), every row its own."""
  drop = draw_drop(module, rate, train)
  return x if drop is None else drop(x, number_rows(x.shape[:-1]))


def number_rows(shape: tuple[int, ...]) -> jax.Array:
  """Returns uint32 of this shape that count up, the last axis fastest; from 2^32 on they start over."""
  return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
