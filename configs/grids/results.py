"""The experiments behind docs/results.md, run and written by `python -m awrsr_jax.reproduce`; no config file.

A row is named and says what differs from its table; the first is the one that others are compared with.
"""

from awrsr_jax.analysis.grid import Anchor, Cost, Table

BEAUTY, SPORTS, ML1M = "amazon-beauty.txt", "amazon-sports.txt", "ml-1m.txt"

END, LAG = ({"model.awr.slots": slots} for slots in ("end", "lag"))  # the configs of B have lag
NONE = {"none": {"model.refine": "none"}}
VALUE = {"value": {"model.refine": "value"} | END}
PAPER = NONE | {name: {"model.refine": name} for name in ("simple", "value", "additive")}  # the configs of A have end
NEWEST = {"data.long_history": "newest", "train.epochs": 60}  # ML-1M before windows of long histories
WIDTH_128, WIDTH_256 = ({"model.width": width, "model.ffn_width": width} for width in (128, 256))
ADDITIVE_ON_SCORES, ADDITIVE_ON_WEIGHTS = (
    {"model.refine": "additive", "model.awr.additive_on": what} for what in ("scores", "weights"))
BY_LAG = LAG | {"model.awr.gate": 0.1}
ROWS = NONE | VALUE | {
    "value by lag, gated": {"model.refine": "value"} | BY_LAG,
    "additive on weights by lag, gated": ADDITIVE_ON_WEIGHTS | BY_LAG,
    "simple": {"model.refine": "simple"} | END,
    "additive on scores": ADDITIVE_ON_SCORES | END,
    "additive on scores by lag": ADDITIVE_ON_SCORES | LAG,
}

FOUR_HEADS = {"model.heads": 4}
LAW_ROWS = {name: ROWS[name] for name in (
    "none", "value", "simple", "additive on scores", "additive on scores by lag")} | {
    "none, four heads": NONE["none"] | FOUR_HEADS, "value, four heads": VALUE["value"] | FOUR_HEADS,
    "none, four layers": NONE["none"] | {"model.layers": 4}}
LAW = {"train.average": 0.99, "train.epochs": 60, "eval.every_epochs": 4}
LAW_4 = LAW | {"data.synthetic.order": 4}

BASE = "awrsr_jax/config.py"  # where a table states all that it wants
ON_BEAUTY = {"data.name": "beauty", "data.buckets": 6, "model.norm": "query"}
# Norm, dropout and learning rate are those of the published SASRec on Amazon data (Kang and McAuley, 2018); batches are
# larger than its 128, docs/recipes.md.
PUBLISHED_SASREC = ON_BEAUTY | {"model.dropout": 0.5, "loss.num_negatives": 1, "train.batch_size": 512,
                                "train.epochs": 200, "eval.every_epochs": 10}
# configs/beauty.py is these at width 256; a row of "C recipe" leaves one of them out.
RECIPE = {"model.cosine": 14.0, "train.average": 0.997, "train.item_start": "cooccurrence"} | WIDTH_128
WITHOUT = {"dot products": ["model.cosine"], "no averages": ["train.average"],
           "width 64": ["model.width", "model.ffn_width"], "random item vectors": ["train.item_start"]}

STOSA_ON_BEAUTY = Anchor("STOSA", {"test ndcg@10": 0.0422, "test hr@10": 0.0724}, "RecBoard, 5 seeds")


def pair(key: str, what: str, overrides: dict) -> Table:
  """Returns a table of C: none and value where another part of the network is changed."""
  return Table(key, f"Ablation on histories of a law of order 4: {what}", "Does what refinement does depend on this "
               'part of the network? Both rows are those of "C law 4", but for it.', "configs/synthetic.py",
               {name: LAW_ROWS[name] for name in ("none, four heads", "value, four heads")}, LAW_4 | overrides,
               seeds=(0, 1, 2))


def get_grid() -> list[Table | Cost]:
  """Returns the tables."""
  return [
      *(Table(f"A {loss}", f"The paper's setting on Beauty: SASRec, {loss.upper()} with one negative",
              "Does refinement help where the paper says so? Norm, dropout and learning rate are those of the "
              "published SASRec; batches are larger.",
              BASE, PAPER, PUBLISHED_SASREC | {"loss.name": loss}, BEAUTY, anchors=[
                  Anchor(f"SASRec {loss.upper()}", values, "CE-SCE-LLMRec logs, 5 seeds")]) for loss, values in (
                      ("bpr", {"test ndcg@10": 0.0374, "test hr@10": 0.0688}),
                      ("bce", {"test ndcg@10": 0.0353, "test hr@10": 0.0671}))),
      *(Table(key, f"The paper's setting on Beauty: STOSA{network}", f"{text} [stosa.md](stosa.md) looks at what "
              "attention does there.", "configs/beauty_stosa.py", PAPER | {
                  "stochastic": {"model.refine": "stochastic"}}, overrides, BEAUTY, anchors=[STOSA_ON_BEAUTY])
        for key, network, text, overrides in (
            ("A stosa", "", "The published network and loss, with every refinement. The network loses the mean that "
             "attention computes: there refined weights reach covariances alone.", {}),
            ("A stosa mended", ", its mean passed on", "The same with a network that passes the mean of attention on: "
             "there refined weights reach both.", {"model.faithful": False}))),
      Table("B beauty", "The strongest setting: full softmax on Beauty",
            "Does refinement add anything to a SASRec that is trained as well as we can? All items are negatives, and "
            "dropout is high. [results_beauty.md](results_beauty.md) has five seeds of none and value under an "
            "older recipe.",
            "configs/beauty.py", ROWS, {}, BEAUTY, anchors=[
                Anchor("SASRec full CE", {"test ndcg@10": 0.0597, "test hr@10": 0.0986}, "CE-SCE-LLMRec logs, 5 seeds"),
                Anchor("BSARec", {"test ndcg@10": 0.0609, "test hr@10": 0.1004}, "RecBoard, 5 seeds"),
                Anchor("eSASRec", {"test ndcg@10": 0.0523, "test hr@10": 0.0928}, "transformer_benchmark README"),
                STOSA_ON_BEAUTY]),
      Table("B beauty 128", "A weaker setting: full softmax on Beauty, width 128",
            "The same question under the recipe that was the best one before.", "configs/beauty.py",
            {name: ROWS[name] for name in ("none", "value", "value by lag, gated")}, WIDTH_128, BEAUTY, seeds=(0, 1)),
      Table("B sports", "The strongest setting: full softmax on Sports",
            "The recipe of Beauty at width 128 on another corpus, with nothing tuned for it.",
            "configs/sports.py", ROWS, {}, SPORTS, anchors=[
                Anchor("BSARec", {"test ndcg@10": 0.0342}, "RecBoard"),
                Anchor("eSASRec", {"test ndcg@10": 0.0323}, "transformer_benchmark README")]),
      Table("B ml1m", "The strongest setting: full softmax on ML-1M",
            "Long histories and a small catalogue. The network has gated branches and a gated feed-forward.",
            "configs/ml1m.py", ROWS, {}, ML1M, anchors=[
                Anchor("SASRec, softmax over 3,000 negatives", {"test ndcg@10": 0.1857}, "antklen README"),
                Anchor("HSTU-large", {"test ndcg@10": 0.1893}, "HSTU README, its own order of ties")]),
      Table("B ml1m newest", "A weaker setting: full softmax on ML-1M, the newest 200 items of a history",
            "The same question under the recipe that was the best one before.", "configs/ml1m.py",
            {name: ROWS[name] for name in ("none", "additive on scores by lag")}, NEWEST, ML1M, seeds=(0, 1)),
      Table("C recipe", "Ablation on Beauty: the recipe", "What is each part of the recipe worth to a plain SASRec? "
            "It is at width 128, for time's sake.",
            BASE, {"the recipe, width 128": NONE["none"] | RECIPE, "width 256": NONE["none"] | RECIPE | WIDTH_256} | {
                name: NONE["none"] | {key: value for key, value in RECIPE.items() if key not in left_out}
                for name, left_out in WITHOUT.items()},
            ON_BEAUTY | {"model.dropout": 0.6, "train.epochs": 40, "train.batch_size": 512, "eval.every_epochs": 4},
            BEAUTY, seeds=(0, 1)),
      *(Table(f"C start {key}", f"Ablation on {title}: where item vectors start",
              "The start from co-occurrence was found on Beauty. What is it worth elsewhere?", f"configs/{key}.py", {
                  "random item vectors": NONE["none"] | {"train.item_start": "random"},
                  "co-occurrence": NONE["none"] | {"train.item_start": "cooccurrence"}},
              overrides, data, seeds=(0, 1)) for key, title, data, overrides in (
                  ("sports", "Sports", SPORTS, {}), ("ml1m", "ML-1M", ML1M, NEWEST))),
      Table("C windows", "Ablation on ML-1M: what of a long history is trained on",
            "A quarter of the users have histories longer than n = 200. Is what lies before worth training on? Both "
            "rows have about as many updates in all.", "configs/ml1m.py", {
                "the newest n items": NONE["none"] | NEWEST, "all, in windows of n": NONE["none"]},
            {}, ML1M, seeds=(0, 1)),
      Table("C refinement", "Ablation on Beauty: the refinement itself",
            "Which part of value refinement matters? The recipe is that of B at width 128; rank 64, order 1 and dot "
            "products unless a row says otherwise.", "configs/beauty.py", NONE | {
                name: VALUE["value"] | overrides for name, overrides in {
                    "value, rank 64": {"model.awr.rank": 64}, "value, order 2": {"model.awr.order": 2},
                    "value, projection": {"model.awr.value_projection": True},
                    "value, slots by lag": LAG, "value, gate .1": {"model.awr.gate": 0.1}}.items()},
            WIDTH_128, BEAUTY, seeds=(0,)),
      *(Table(f"C law {order}", f"Ablation on histories of a law of order {order}",
              "An item depends on as many before it (docs/method.md, the synthetic law), and the best that any model "
              "can do is known. Does refinement help to find the law?", "configs/synthetic.py",
              {name: LAW_ROWS[name] for name in names},
              LAW | {"data.synthetic.order": order},
              seeds=(0, 1, 2)) for order, names in ((1, ("none", "value")), (2, LAW_ROWS), (4, LAW_ROWS))),
      Table("C law refinement", "Ablation on histories of a law of order 4: the refinement itself",
            "Which part of value refinement matters where it helps? Rank 16, order 1, dot products and slots from the "
            "end unless a row says otherwise; four heads, each with weights of its own.", "configs/synthetic.py",
            {name: LAW_ROWS[name] for name in ("none, four heads", "value, four heads")} | {
                name: LAW_ROWS["value, four heads"] | overrides for name, overrides in {
                    "rank 4": {"model.awr.rank": 4}, "rank 64": {"model.awr.rank": 64},
                    "order 2": {"model.awr.order": 2}, "order 3": {"model.awr.order": 3},
                    "Wasserstein correlation": {"model.awr.correlation": "wasserstein"},
                    "projection": {"model.awr.value_projection": True}, "slots by lag": LAG,
                    "gate .1": {"model.awr.gate": 0.1}, "gate .5": {"model.awr.gate": 0.5},
                    "shared by heads": {"model.awr.share_heads": True}}.items()},
            LAW_4, seeds=(0, 1, 2)),
      *(pair(f"C law layers {layers}", f"layers={layers}", {"model.layers": layers}) for layers in (1, 3)),
      *(pair(f"C law norm {norm}", f"norm={norm}", {"model.norm": norm}) for norm in ("post", "query")),
      pair("C law gated", "gated blocks", {"model.activation": "swiglu", "model.branch_gates": True}),
      pair("C law sink", "an attention sink", {"model.attention.sink": 3.2}),
      Table("C law 4 long", "Ablation on histories of a law of order 4: 120 epochs",
            "After 60 epochs plain attention is still rising. What is left of the difference where it ends?",
            "configs/synthetic.py", {
                name: LAW_ROWS[name] for name in ("none, four heads", "value, four heads", "none", "value")} | {
                    "none, four heads, four layers": LAW_ROWS["none, four layers"] | FOUR_HEADS},
            LAW_4 | {"train.epochs": 120}, seeds=(0, 1, 2)),
      Cost("D", "Cost", "What the runs of B cost. Times were taken beside other work on one shared machine and compare "
           "nothing; [performance.md](performance.md) measures cost.",
           ("B beauty", "B beauty 128", "B sports", "B ml1m", "B ml1m newest")),
  ]
