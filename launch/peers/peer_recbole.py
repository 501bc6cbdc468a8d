"""SASRec of RecBole, trained and evaluated by its own loaders and trainer."""

import contextlib
import itertools
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import serve
import torch
from recbole import __version__ as recbole_version
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

REQUIREMENTS = ["recbole==1.2.1", "numpy<2", "pandas<2.2", "scipy<1.12", "torch==2.13.0", "setuptools<81"]
TRAIN_BATCH_SIZE = 2048  # samples: RecBole's default


class LimitedBatches:
  """The batches of a loader until the clock says that the time is over; goes on where it stopped."""

  def __init__(self, loader):
    self.clock = serve.Clock(0.0)
    self.shuffle = loader.shuffle
    self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

  def __iter__(self) -> Iterator:
    over = False
    while not over:
      batch = next(self.batches)
      yield batch
      over = self.clock.step(len(batch))  # The trainer asks for the next batch when it is done with this one.


class UnseenLoader(FullSortEvalDataLoader):
  """RecBole's loader, which filters nothing for sequential models, with the items that each user has seen."""

  def collate_fn(self, index):
    """Returns what the trainer evaluates, with (rows, items) to filter."""
    batch, _, rows, targets = super().collate_fn(index)
    items = batch[self.iid_field + self.config["LIST_SUFFIX"]]
    real = items != 0
    return batch, (real.nonzero()[:, 0], items[real]), rows, targets


class RecBole:
  """The peer."""

  name = "RecBole"
  version = recbole_version

  def __init__(self, spec):
    sequences = serve.read_sequences(spec.sequences)
    self.users = serve.test_users(sequences)
    batch_size = max(spec.batch_size, TRAIN_BATCH_SIZE)
    # Its trainer would leave TensorBoard's files in the current folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
      write_interactions(pathlib.Path(folder) / "peer" / "peer.inter", sequences)
      self.config = Config(model="SASRec", dataset="peer", config_dict={
        "data_path": folder, "checkpoint_dir": folder, "show_progress": False, "use_gpu": False, "worker": 0,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": spec.max_length, "n_layers": spec.layers, "n_heads": spec.heads,
        "hidden_size": spec.width, "inner_size": spec.width, "hidden_dropout_prob": spec.dropout,
        "attn_dropout_prob": spec.dropout, "loss_type": {"bce": "BPR", "softmax": "CE"}[spec.loss],
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1} if spec.loss == "bce" else None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["Hit", "NDCG"], "topk": [serve.TOP], "valid_metric": f"NDCG@{serve.TOP}",
        "metric_decimal_place": 8, "train_batch_size": batch_size, "eval_batch_size": spec.eval_batch_size,
        "learning_rate": spec.learning_rate, "seed": spec.seed, "reproducibility": False,
      })
      init_seed(spec.seed, self.config["reproducibility"])
      torch.set_num_threads(spec.threads)
      self.dataset = create_dataset(self.config)
      train_loader, _, self.test_loader = data_preparation(self.config, self.dataset)
      self.model = SASRec(self.config, train_loader._dataset)
      self.trainer = Trainer(self.config, self.model)
    self.batches = LimitedBatches(train_loader)
    self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
    loss = "BPR over one target and one negative, the nearest to bce" if spec.loss == "bce" else "cross entropy"
    self.note = (f"every prefix is a sample with one target; {loss}; {batch_size} samples a batch, in its favour; "
                 f"of the seen items the newest {spec.max_length} are filtered")

  def train(self, seconds: float) -> dict:
    """See serve.Peer."""
    self.batches.clock = serve.Clock(seconds)
    self.trainer._train_epoch(self.batches, 0)
    return self.batches.clock.answer()

  def evaluate(self, users: int) -> dict:
    """See serve.Peer."""
    start = time.perf_counter()
    tokens = [str(user) for user in self.users[:users]]
    chosen = self.dataset.token2id(self.dataset.uid_field, tokens)
    tests = self.test_loader._dataset
    tests = tests.copy(tests.inter_feat[np.isin(tests.inter_feat[tests.uid_field].numpy(), chosen)])
    loader = UnseenLoader(self.config, tests, self.test_loader._sampler)
    values = self.trainer.evaluate(loader, load_best_model=False)
    names = {f"{name}@{serve.TOP}": float(values[f"{name}@{serve.TOP}"]) for name in ("hit", "ndcg")}
    return {"users": len(tests), "seconds": time.perf_counter() - start} | names


def write_interactions(path: pathlib.Path, sequences: list[np.ndarray]) -> None:
  """Writes the sequences as an atomic file of RecBole: users are rows, times are places."""
  path.parent.mkdir()
  with path.open("w", encoding="utf-8") as file:
    file.write("user_id:token\titem_id:token\ttimestamp:float\n")
    for user, sequence in enumerate(sequences):
      file.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(sequence))


if __name__ == "__main__":
  specification = serve.read_spec()
  serve.serve(RecBole(specification), specification.eval_batch_size)
