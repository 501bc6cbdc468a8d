"""What the commands of the package share: clear words about wrong flags, and programs kept for the next start."""

import difflib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from awrsr_jax import config as defaults
from awrsr_jax.config import default, walk
from awrsr_jax.foreign import LONGEST, printable


def suggest(key: str, known: Sequence[str]) -> str:
  """Returns what may have been meant by a config key that does not exist; `known` are those that do."""
  close = difflib.get_close_matches(key, known, n=3)
  return f"did you mean {' or '.join(close)}?" if close else "awrsr_jax/config.py lists them all"


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a config key or file that does not exist is one clear line, not a traceback."""
  known = [key for key, _ in walk(default())]
  for flag in argv[1:]:
    name, _, value = flag.lstrip("-").partition("=")
    key = name.partition(".")[2]
    if flag.startswith("-") and name.startswith("config.") and key not in known:
      sys.exit(f"ValueError: --{name}: the config has no such key; {suggest(key, known)}")
    if name == "config" and value and not pathlib.Path(value.partition(":")[0]).exists():
      sys.exit(f"ValueError: --config={value}: no such file, seen from {pathlib.Path.cwd()}")
  return app.parse_flags_with_usage(argv)


def parse_flags_or_defaults(argv: list[str]) -> list[str]:
  """As parse_flags, of commands that can do without a config file: config.py is one, with the defaults."""
  names = {flag.lstrip("-").partition("=")[0] for flag in argv[1:] if flag.startswith("-")}
  # in front and not as the flag's default: that would be read, with all keys, before their names are checked
  file = [] if "config" in names else [f"--config={defaults.__file__}"]
  return parse_flags([argv[0], *file, *argv[1:]])


def require_config() -> None:
  """Has a command line without --config refused."""
  flags.register_validator("config", lambda config: config is not None, "--config=FILE is missing; configs/ has some")


def begin(argv: Sequence[str]) -> None:
  """What commands begin with: no arguments but flags, few words of libraries, kept programs."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; flags start with --")
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("awrsr_jax").setLevel(logging.INFO)
  keep_compiled()


def in_one_line(error: Exception) -> str:
  """Returns an error for the terminal; what it quotes of files moves no cursor, and fills no screen."""
  words = f"{type(error).__name__}: {error}"
  return printable(words if len(words) <= LONGEST else f"{words[:LONGEST]} ...")


def refuse(error: Exception) -> NoReturn:
  """Ends a command with an error in one line."""
  sys.exit(in_one_line(error))


def cache_folder() -> pathlib.Path:
  """Returns the folder of the user for what can be made again."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "awrsr_jax"


def keep_compiled() -> None:
  """Has compiled programs kept on disk, so that a second start, or a resumed run, compiles nothing again."""
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # JAX would keep what takes a second or more
  if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
