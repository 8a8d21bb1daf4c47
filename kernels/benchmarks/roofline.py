"""What a training step takes on a GPU: modelled, not measured, and without one.

    python kernels/benchmarks/roofline.py --config configs/model/nano_3b.yaml --tokens 8192

The model and its loss run forward and backward on tensors without data; every operation's launches,
bytes and FLOP are counted, and turned into time by the rates in ``nemo_hybrid/chips.py``. Prints
where the time goes, by operation, by kind of layer and by kind of matrix product; what is kept for
the backward pass; and where the host waits. ``--json FILE`` writes the same.

Shapes and options of one process: one row of ``--tokens`` tokens in ``--documents`` equally long
documents, ``--ep`` processes that share the experts, ``--accumulation`` micro-batches per update.
``--paths gpu`` takes this project's kernels, as a GPU does; ``reference`` only those for experts.
Exit status: 0, or 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import machine, write_json

from nemo_hybrid.chips import DEVICES, rates
from nemo_hybrid.commands.memory import Layout
from nemo_hybrid.commands.step_time import Counted, count, paths_of, report
from nemo_hybrid.config.read import load_config
from nemo_hybrid.errors import UserError

CHIPS = ("h100", "h200", "b200")


def main(words: Sequence[str] | None = None) -> int:
    given = parse(words)
    try:
        shape = load_config([], ["--model", given.config]).model.hybrid()
        shape.validate()
        if shape.n_routed_experts % given.ep:
            experts = f"the number of experts ({shape.n_routed_experts})"
            raise UserError(f"--ep {given.ep} does not divide {experts}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    at = Layout(
        cfg=shape, processes=given.ep, ep=given.ep, zero=1, width=2, rows=1, length=given.tokens,
        recompute=given.recompute, accumulation=given.accumulation, cpu=False, reference=(),
        host_copy=False,
    )  # fmt: skip
    paths = paths_of(given.paths)
    counted = count(at, paths, given.documents)
    found = report(counted, DEVICES[given.chip])
    print("\n".join(lines(counted, found, given, paths)))
    if given.json:
        asked = {key: value for key, value in vars(given).items() if key != "json"}
        asked["config"] = Path(given.config).stem
        about = machine("cpu", "")
        software = {key: about[key] for key in ("commit", "torch", "triton", "date")}
        result = {"modelled": "not measured", "asked": asked, "paths": paths, "made_by": software}
        write_json(given.json, result | found)
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="a file of configs/model")
    parser.add_argument("--tokens", type=positive, default=8192, help="of the row")
    parser.add_argument("--documents", type=positive, default=1, help="in the row")
    parser.add_argument("--ep", type=positive, default=1, help="processes that share the experts")
    parser.add_argument("--accumulation", type=positive, default=16, help="rows per update")
    parser.add_argument("--recompute", default="", help="letters of layers that are recomputed")
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--paths", choices=("reference", "gpu"), default="gpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(words)
    if set(given.recompute) - set("ME*-e"):
        parser.error(f"--recompute {given.recompute}: expected letters of M, E, *, - and e")
    if given.documents > given.tokens:
        parser.error(f"--documents {given.documents}: more than --tokens {given.tokens}")
    return given


def lines(
    counted: Counted, found: dict[str, Any], given: argparse.Namespace, paths: dict[str, str]
) -> Iterator[str]:
    ours = ", ".join(f"{op} {path}" for op, path in paths.items() if path != "reference")
    yield f"{Path(given.config).stem} on one {given.chip}, modelled, not measured; paths: {ours}"
    yield (
        f"{found['us_per_token']:.2f} us per token, {found['tokens_per_s']:,.0f} tokens/s, MFU "
        f"{found['mfu']:.1%}; {found['fp32_matmul_flop_share']:.1%} of matrix FLOP in fp32; "
        f"{found['peak_bytes'] / 1e9:.1f} GB alive at most"
    )
    waits = ", ".join(f"{n} x {what}" for what, n in found["waits"].items()) or "nowhere"
    yield f"the host waits {found['host_syncs_per_micro_batch']} times per micro-batch: {waits}"
    yield ""
    yield row("operation", "us/token", "share", "kB/token", "launches", "kept, MB")
    for op, of in found["ops"].items():
        share = of["us"] / found["us_per_token"]
        sizes = (f"{of['bytes_per_token'] / 1e3:,.1f}", f"{of['launches']:,.0f}")
        yield row(op, f"{of['us']:.3f}", f"{share:.1%}", *sizes, f"{of['kept_bytes'] / 1e6:,.0f}")
    yield ""
    yield row("product", "MFLOP/token", "us/token")
    for name, unit in found["units"].items():
        yield row(name, f"{unit['flop_per_token'] / 1e6:,.1f}", f"{unit['us']:.3f}")
    yield ""
    yield row("one layer", "us/token", "kB/token", "launches")
    yield from _layers(counted, given.chip)


def _layers(counted: Counted, chip: str) -> Iterator[str]:
    """Per layer of each kind, forward and backward."""
    at, rate = counted.at, rates(DEVICES[chip])
    sums: dict[str, list[float]] = {}
    for (work, (part, _)), n in counted.micro_batch.items():
        of = sums.setdefault(part, [0.0, 0.0, 0.0])
        figures = (work.seconds(rate) * 1e6 / at.tokens, work.bytes / at.tokens, work.launches)
        sums[part] = [total + n * figure for total, figure in zip(of, figures, strict=True)]
    for part, figures in sorted(sums.items()):
        layers = at.cfg.pattern.count(part) if len(part) == 1 else 1
        us, size, launches = (figure / layers for figure in figures)
        name = part or "the rest"
        yield row(name, f"{us:.3f}", f"{size / 1e3:,.1f}", f"{launches:,.0f}")


def row(name: str, *cells: str) -> str:
    return f"{name:24}" + "".join(f"{cell:>13}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
