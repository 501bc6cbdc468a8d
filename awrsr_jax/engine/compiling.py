"""How long a run spends on compiling, as JAX itself tells it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # of each program, fetched from the cache or not
FETCHED = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compiled:
  """What was compiled while it was watched: wall seconds, programs, and how many of them the cache on disk had."""

  seconds: float = 0.0
  programs: int = 0
  from_cache: int = 0


@contextlib.contextmanager
def watching() -> Iterator[Compiled]:
  """Yields a record that grows while the context lasts; programs compiled side by side add up."""
  record = Compiled()

  def note_program(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILED:
      record.seconds += duration_secs
      record.programs += 1

  def note_fetch(event: str, **_: str | int) -> None:
    record.from_cache += event == FETCHED

  jax.monitoring.register_event_duration_secs_listener(note_program)
  jax.monitoring.register_event_listener(note_fetch)
  try:
    yield record
  finally:
    jax.monitoring.unregister_event_duration_listener(note_program)
    jax.monitoring.unregister_event_listener(note_fetch)
