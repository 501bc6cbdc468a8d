"""Which columns of a table are user, item, time, rating and title."""

from typing import Any

KEYS = ("user", "item", "time", "rating", "title")
LAYOUTS = {  # who publishes it: the names of user, item, time, rating and title ("" where there is none)
    "generic": ("user", "item", "time", "rating", "title"),
    "generic with _id": ("user_id", "item_id", "timestamp", "rating", "title"),
    "Amazon reviews 2014 and 2018": ("reviewerID", "asin", "unixReviewTime", "overall", ""),
    "Amazon reviews 2023": ("user_id", "parent_asin", "timestamp", "rating", ""),
    "Yelp reviews": ("user_id", "business_id", "date", "stars", ""),
    "MovieLens": ("userId", "movieId", "timestamp", "rating", ""),
    "MovieLens in TFDS": ("user_id", "movie_id", "timestamp", "user_rating", "movie_title"),
    "RecBole": ("user_id:token", "item_id:token", "timestamp:float", "rating:float", ""),
}
LATER = {  # looked for where none of those fits, not even with what the config names
    "generic with timestamp": ("user", "item", "timestamp", "rating", "title"),
    "generic with _id and time": ("user_id", "item_id", "time", "rating", "title"),
}
HEADER = "--config.data.header=user,item,rating,time, in the order of its columns"


def choose_columns(names: list[str], columns: Any, where: str) -> dict[str, str]:
  """Returns which column is "user", "item" and "time", and, where there is one, "rating" and "title".

  Args:
    names: of the columns that there are.
    columns: `config.data.columns`; what is empty there is filled in by the first layout that fits.
    where: for messages.

  Raises:
    ValueError: a column that the config names is not there, several have one name, or no layout fits.
  """
  chosen = {"user": columns.user, "item": columns.item, "time": columns.time, "rating": columns.rating,
            "title": columns.title}
  chosen = {key: name for key, name in chosen.items() if name}
  for key, name in chosen.items():
    if name not in names:
      raise ValueError(f"{where} has no column {name!r}, but {names}; set --config.data.columns.{key}=NAME")
  if len(set(names)) < len(names):
    raise ValueError(f"{where} has several columns of one name: {names}; give each its own")
  for layouts in (LAYOUTS, LATER):
    for layout in layouts.values():
      full = {key: name for key, name in zip(KEYS, layout, strict=True) if name in names} | chosen
      if tuple(full.get(key) for key in KEYS[:3]) == layout[:3]:
        return {key: full[key] for key in KEYS if key in full}
    for layout in layouts.values():  # what the config names, and the rest of user, item and time
      full = {key: name for key, name in zip(KEYS[:3], layout[:3], strict=True) if name in names} | chosen
      if set(KEYS[:3]) <= full.keys():
        return {key: full[key] for key in KEYS if key in full}
  known = "; ".join(f"{', '.join(layout[:3])} ({name})" for name, layout in (LAYOUTS | LATER).items())
  headless = f"; for a file whose first line is a row already set {HEADER}" * any(map(is_number, names))
  raise ValueError(f"{where}: which of the columns {names} are user, item and time? Known are {known}; for others set "
                   f"--config.data.columns.user=NAME, .item=NAME and .time=NAME{headless}")


def is_number(text: str) -> bool:
  """Returns whether a text is a number."""
  try:
    float(text)
  except ValueError:
    return False
  return True
