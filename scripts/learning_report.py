"""Print how well a finished run learned, against bars: python scripts/learning_report.py RUN_DIR

The bars: the last held-out loss is below half of the first and below a bigram with interpolated
absolute discounting (bigram.py) fitted to the whole training store; every
multi-token-prediction depth is below the same kind of model of its own target; no expert is dead.
The bigram is scored on exactly the targets that the run's evaluation uses.

Exit status: 0 when every bar is met, 1 when one is missed, 2 when the run cannot be judged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bigram import Ids, PairModel, fit_pairs, pairs_within_documents

from nemo_hybrid.checkpoint.steps import model_shape
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Blend, heldout_batches, open_blend
from nemo_hybrid.errors import UserError
from nemo_hybrid.objectives.next_token import labels_and_validity
from nemo_hybrid.train.metrics import METRICS_FILE, evaluations, read_metrics
from nemo_hybrid.train.progress import clock
from nemo_hybrid.train.run_dir import CONFIG_FILE

DISCOUNT = 0.75
MARGIN_AIMED_AT = 0.5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    bar: str = ""
    passed: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print how well a finished run learned.")
    parser.add_argument("run_dir", type=Path, help="directory of a finished run")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        rows = report(run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    return 1 if any(row.passed is False for row in rows) else 0


def report(run_dir: Path) -> list[Row]:
    """The lines of the table. Raises UserError where the run cannot be judged."""
    metrics = read_metrics(run_dir / METRICS_FILE)
    evaluated = evaluations(metrics)
    if len(evaluated) < 2:
        raise UserError(
            f"{run_dir} has {len(evaluated)} evaluation(s) on held-out data, two are needed: "
            "train with train.eval_sequences above 0, to the end"
        )
    (first_step, first), (last_step, last) = evaluated[0], evaluated[-1]
    config = load_config([run_dir / CONFIG_FILE])
    baselines = pair_model_losses(config, depths=len(last) - 1)
    tail = metrics[-max(1, len(metrics) // 10) :]
    dead = max(m.dead_experts for m in tail)

    rows = [
        Row(f"held-out loss, first evaluation (step {first_step})", f"{first[0]:.3f}"),
        Row(
            f"held-out loss, last evaluation (step {last_step})",
            f"{last[0]:.3f} ({last[0] / first[0]:.1%} of the first)",
            "< 50%",
            last[0] < 0.5 * first[0],
        ),
        Row(
            f"below a bigram (D = {DISCOUNT})",
            f"{last[0]:.3f} against {baselines[0]:.3f}: by {baselines[0] - last[0]:.3f}",
            f"> 0, aim {MARGIN_AIMED_AT}",
            last[0] < baselines[0],
        ),
    ]
    for k in range(1, len(last)):
        rows.append(
            Row(
                f"MTP depth {k} below a pair model of t -> t+{k + 1}",
                f"{last[k]:.3f} against {baselines[k]:.3f}: by {baselines[k] - last[k]:.3f}",
                "> 0",
                last[k] < baselines[k],
            )
        )
    seconds = sum(m.step_seconds for m in metrics)
    rows += [
        Row(f"dead experts in any of the last {len(tail)} steps", f"{dead}", "0", dead == 0),
        Row("training time (steps alone)", f"{seconds:.0f} s ({clock(seconds)})"),
        Row("training tokens", f"{metrics[-1].tokens_total:,} in {metrics[-1].step} steps"),
    ]
    if metrics[-1].step < config.train.max_steps:
        rows.append(Row("not finished", f"step {metrics[-1].step} of {config.train.max_steps}"))
    return rows


def pair_model_losses(config: RunConfig, depths: int) -> list[float]:
    """Held-out cross-entropy, in nats, of the pair model t -> t + 1 + k for k = 0 to depths."""
    blend = open_blend(config.data, model_shape(config.model))
    batches = heldout_batches(
        blend,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        rank=0,
        world_size=1,
        limit=config.train.eval_sequences,
    )
    scored = held_out_pairs(batches, depths)
    return [
        fit_training_data(blend, distance=k + 1).cross_entropy(*scored[k])
        for k in range(depths + 1)
    ]


def held_out_pairs(batches: Iterable[Batch], depths: int) -> list[tuple[Ids, Ids]]:
    """Per depth, the (token, target) pairs that the run's evaluation scores."""
    found: list[list[tuple[Ids, Ids]]] = [[] for _ in range(depths + 1)]
    for batch in batches:
        for k, (labels_BS, valid_BS) in enumerate(
            zip(*labels_and_validity(batch, depths), strict=True)
        ):
            pair = batch.ids_BS[valid_BS].numpy(), labels_BS[valid_BS].numpy()
            found[k].append(pair)
    return [
        (np.concatenate([c for c, _ in pairs]), np.concatenate([t for _, t in pairs]))
        for pairs in found
    ]


def fit_training_data(blend: Blend, distance: int) -> PairModel:
    """The model of (token t, token t + distance) over every document of the training stores."""
    pairs = [
        pairs_within_documents(
            store.read(0, len(store)), store.document_starts(0, len(store)), distance
        )
        for store in blend.train
    ]
    contexts = np.concatenate([c for c, _ in pairs])
    following = np.concatenate([t for _, t in pairs])
    return fit_pairs(contexts, following, blend.train[0].info.vocab_size, DISCOUNT)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table whose columns line up."""
    verdict = {None: "", True: "PASS", False: "FAIL"}
    cells = [["", "figure", "bar", ""]]
    cells += [[row.what, row.value, row.bar, verdict[row.passed]] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in cells
    )


if __name__ == "__main__":
    sys.exit(main())
