"""SASRec in plain PyTorch, written in the manner of SASRec.pytorch (pmixer).

Shapes: B rows, L length, N real positions, D width.
"""

import time
from collections.abc import Iterator

import numpy as np
import serve
import torch
from torch import nn
from torch.nn import functional

REQUIREMENTS = ["torch==2.13.0", "numpy"]


class Block(nn.Module):
  """Attention with a normed query, then the point-wise feed-forward, each added to its normed input."""

  def __init__(self, width: int, heads: int, dropout: float):
    super().__init__()
    self.query_norm = nn.LayerNorm(width, eps=1e-8)
    self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
    self.norm = nn.LayerNorm(width, eps=1e-8)
    self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout), nn.ReLU(),
                                      nn.Linear(width, width), nn.Dropout(dropout))

  def forward(self, x_BxLxD: torch.Tensor, causal_LxL: torch.Tensor) -> torch.Tensor:
    query_BxLxD = self.query_norm(x_BxLxD)
    attended_BxLxD, _ = self.attention(query_BxLxD, x_BxLxD, x_BxLxD, attn_mask=causal_LxL, is_causal=True,
                                       need_weights=False)
    x_BxLxD = self.norm(query_BxLxD + attended_BxLxD)
    return x_BxLxD + self.feed_forward(x_BxLxD)


class SASRec(nn.Module):
  """Maps rows of items, left-padded with 0, to the hidden states that predict the items after them."""

  def __init__(self, num_items: int, length: int, width: int, layers: int, heads: int, dropout: float):
    super().__init__()
    self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
    self.positions = nn.Parameter(torch.empty(length, width))
    self.dropout = nn.Dropout(dropout)
    self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
    self.norm = nn.LayerNorm(width, eps=1e-8)
    self.register_buffer("causal_LxL", torch.ones(length, length, dtype=torch.bool).triu(1))
    for parameter in self.parameters():
      if parameter.dim() > 1:
        nn.init.xavier_normal_(parameter)
    with torch.no_grad():
      self.items.weight[0] = 0

  def forward(self, items_BxL: torch.Tensor) -> torch.Tensor:
    x_BxLxD = self.items(items_BxL) * self.items.embedding_dim**0.5 + self.positions
    x_BxLxD = self.dropout(x_BxLxD) * (items_BxL != 0).unsqueeze(-1)
    for block in self.blocks:
      x_BxLxD = block(x_BxLxD, self.causal_LxL)
    return self.norm(x_BxLxD)


def pad(sequences: list[np.ndarray], length: int) -> np.ndarray:
  """Returns the newest items of each sequence in a row, padded with 0 on the left."""
  rows = np.zeros((len(sequences), length), np.int64)
  for row, sequence in zip(rows, sequences, strict=True):
    newest = sequence[-length:]
    row[length - len(newest):] = newest
  return rows


class Torch:
  """The peer. All training rows are padded once; batches are shuffled epochs over them."""

  name = "PyTorch"
  version = torch.__version__
  note = ("in the manner of SASRec.pytorch; in its favour: rows padded once, negatives drawn by numpy, logits at real "
          "positions only, attention without weights")

  def __init__(self, spec):
    torch.manual_seed(spec.seed)
    torch.set_num_threads(spec.threads)
    self.spec = spec
    self.random = np.random.default_rng(spec.seed)
    self.sequences = serve.read_sequences(spec.sequences)
    self.users = serve.test_users(self.sequences)
    parts = [part for part in map(serve.train_part, self.sequences) if len(part) > 1]
    self.rows = pad(parts, spec.max_length + 1)
    # What each row's user has, as sorted numbers row * (num_items + 1) + item.
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    self.owned = np.unique(owners * (spec.num_items + 1) + np.concatenate(parts))
    self.model = SASRec(spec.num_items, spec.max_length, spec.width, spec.layers, spec.heads, spec.dropout)
    self.optimizer = torch.optim.Adam(self.model.parameters(), spec.learning_rate, betas=(0.9, 0.98))
    self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
    self.batches = self.shuffled_batches()

  def shuffled_batches(self) -> Iterator[np.ndarray]:
    """Yields the row numbers of batch after batch, without end."""
    while True:
      order = self.random.permutation(len(self.rows))
      for start in range(0, len(order), self.spec.batch_size):
        yield order[start:start + self.spec.batch_size]

  def negatives(self, rows_N: np.ndarray) -> torch.Tensor:
    """Returns an item for each position that its row's user does not have (after 20 tries: any item)."""
    items_N = self.random.integers(1, self.spec.num_items + 1, len(rows_N))
    again = np.arange(len(rows_N))
    for _ in range(20):
      keys = rows_N[again] * (self.spec.num_items + 1) + items_N[again]
      places = np.searchsorted(self.owned, keys).clip(max=len(self.owned) - 1)
      again = again[self.owned[places] == keys]
      if not len(again):
        break
      items_N[again] = self.random.integers(1, self.spec.num_items + 1, len(again))
    return torch.from_numpy(items_N)

  def loss(self, rows_B: np.ndarray) -> tuple[torch.Tensor, int]:
    """Returns the mean loss of a batch and its number of targets."""
    items = torch.from_numpy(self.rows[rows_B])
    inputs_BxL, targets_BxL = items[:, :-1], items[:, 1:]
    mask_BxL = inputs_BxL != 0
    targets_N = targets_BxL[mask_BxL]
    hidden_NxD = self.model(inputs_BxL)[mask_BxL]
    if self.spec.loss == "softmax":
      return functional.cross_entropy(hidden_NxD @ self.model.items.weight.T, targets_N), len(targets_N)
    negatives_N = self.negatives(np.repeat(rows_B, mask_BxL.sum(1).numpy()))
    positive_N = (hidden_NxD * self.model.items(targets_N)).sum(-1)
    negative_N = (hidden_NxD * self.model.items(negatives_N)).sum(-1)
    return (functional.softplus(-positive_N) + functional.softplus(negative_N)).mean(), len(targets_N)

  def train(self, seconds: float) -> dict:
    """See serve.Peer."""
    self.model.train()
    clock, over = serve.Clock(seconds), False
    while not over:
      loss, targets = self.loss(next(self.batches))
      self.optimizer.zero_grad()
      loss.backward()
      self.optimizer.step()
      over = clock.step(targets)
    return clock.answer()

  @torch.no_grad()
  def evaluate(self, users: int) -> dict:
    """See serve.Peer."""
    self.model.eval()
    start, hits = time.perf_counter(), []
    chosen = self.users[:users]
    for first in range(0, len(chosen), self.spec.eval_batch_size):
      batch = [self.sequences[user] for user in chosen[first:first + self.spec.eval_batch_size]]
      seen, targets_B = [sequence[:-1] for sequence in batch], np.array([sequence[-1] for sequence in batch])
      hidden_BxD = self.model(torch.from_numpy(pad(seen, self.spec.max_length)))[:, -1]
      scores = hidden_BxD @ self.model.items.weight.T
      scores[:, 0] = -torch.inf
      scores[np.repeat(np.arange(len(batch)), [len(items) for items in seen]), np.concatenate(seen)] = -torch.inf
      hits.append(scores.topk(serve.TOP).indices.numpy() == targets_B[:, None])
    values = serve.metrics(np.concatenate(hits))
    return {"users": len(chosen), "seconds": time.perf_counter() - start} | values


if __name__ == "__main__":
  specification = serve.read_spec()
  serve.serve(Torch(specification), specification.eval_batch_size)
