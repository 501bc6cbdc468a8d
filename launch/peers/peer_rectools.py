"""SASRecModel of RecTools, trained by Lightning."""

import time

import numpy as np
import pandas as pd
import serve
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools import __version__ as rectools_version
from rectools.dataset import Dataset
from rectools.models import SASRecModel

REQUIREMENTS = ["rectools[torch]==0.19.0", "torch==2.13.0"]


class Meter(Callback):
  """Counts the real targets, and stops training when the time is over."""

  def __init__(self):
    self.limit = 0.0
    self.clock = serve.Clock(0.0)

  def __deepcopy__(self, memo: dict) -> "Meter":
    return self  # RecTools trains with a copy of the trainer.

  def on_train_start(self, trainer, module) -> None:
    """Starts the clock: what every call of fit_partial does before is not counted."""
    self.clock = serve.Clock(self.limit)

  def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
    """Counts a batch."""
    if self.clock.step(int((batch["y"] != 0).sum())):
      trainer.should_stop = True


def to_dataset(sequences: list[np.ndarray]) -> Dataset:
  """Returns the sequences as a dataset of RecTools: users are rows, times are places."""
  lengths = [len(sequence) for sequence in sequences]
  places = np.concatenate([np.arange(length) for length in lengths])
  return Dataset.construct(pd.DataFrame({
    Columns.User: np.repeat(np.arange(len(sequences)), lengths),
    Columns.Item: np.concatenate(sequences),
    Columns.Weight: 1.0,
    Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(places, unit="s"),
  }))


class RecTools:
  """The peer."""

  name = "RecTools"
  version = rectools_version
  note = ("timed from the first batch to the last, in its favour; negatives may be the user's own items; items that "
          "only validation or test has are unknown to it")

  def __init__(self, spec):
    torch.set_num_threads(spec.threads)
    seed_everything(spec.seed)
    sequences = serve.read_sequences(spec.sequences)
    self.users = serve.test_users(sequences)
    self.targets = np.array([sequences[user][-1] for user in self.users])
    self.train_set = to_dataset([serve.train_part(sequence) for sequence in sequences])
    self.test_set = to_dataset([sequence[:-1] if len(sequence) > 2 else sequence for sequence in sequences])
    self.meter = Meter()
    self.model = SASRecModel(
      n_blocks=spec.layers, n_heads=spec.heads, n_factors=spec.width, session_max_len=spec.max_length,
      dropout_rate=spec.dropout, loss={"bce": "BCE", "softmax": "softmax"}[spec.loss], n_negatives=1,
      lr=spec.learning_rate, batch_size=spec.batch_size, recommend_batch_size=spec.eval_batch_size,
      dataloader_num_workers=0, recommend_torch_device="cpu", get_trainer_func=self.make_trainer)

  def make_trainer(self) -> Trainer:
    """Returns a quiet trainer; fit_partial sets its number of epochs."""
    return Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[self.meter], enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False)

  @property
  def parameters(self) -> int:
    """The number of parameters, once `train` has built the model."""
    return sum(parameter.numel() for parameter in self.model.torch_model.parameters())

  def train(self, seconds: float) -> dict:
    """See serve.Peer."""
    self.meter.limit = seconds
    self.model.fit_partial(self.train_set, min_epochs=0, max_epochs=1_000_000)
    return self.meter.clock.answer()

  def evaluate(self, users: int) -> dict:
    """See serve.Peer."""
    start = time.perf_counter()
    chosen = self.users[:users]
    found = self.model.recommend(chosen, self.test_set, k=serve.TOP, filter_viewed=True,
                                 on_unsupported_targets="ignore")
    hits = np.zeros((len(chosen), serve.TOP))
    places = np.searchsorted(chosen, found[Columns.User])
    hits[places, found[Columns.Rank] - 1] = found[Columns.Item] == self.targets[places]
    values = serve.metrics(hits)
    return {"users": len(chosen), "seconds": time.perf_counter() - start} | values


if __name__ == "__main__":
  specification = serve.read_spec()
  serve.serve(RecTools(specification), specification.eval_batch_size)
