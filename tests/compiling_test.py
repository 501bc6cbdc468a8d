"""Compilation is counted."""

import jax

from awrsr_jax.engine import compiling


def test_programs_are_counted_while_they_are_watched_and_not_after():
  with compiling.watching() as compiled:
    for size in (3, 3, 4):
      jax.block_until_ready(jax.jit(lambda x: x * 1.5 + 0.25)(jax.numpy.ones(size)))
  count = compiled.programs
  assert count >= 2 and compiled.seconds > 0 and 0 <= compiled.from_cache <= count
  jax.jit(lambda x: x - 7.75)(jax.numpy.ones(9))
  assert compiled.programs == count
