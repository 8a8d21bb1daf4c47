"""Time greedy generation on a CPU: ours and transformers' ``generate`` from the same weights.

    python kernels/benchmarks/cpu_generate.py --out cpu_generate.json
    python kernels/benchmarks/cpu_generate.py --from runs/quickstart --text some.py --drafts 3

Both continue the same prompts of one length, at several batch sizes, in turns, one process. The
peer is the fastest of transformers' ``experts_implementation`` at each batch size. Medians of wall
clock and of the process's CPU seconds are printed; where other work runs on the machine the latter
say more. With ``--drafts`` we go on once more with those of the MTP block of a trained model, whose
prompts are pieces of a text: of random weights hardly any would stay. Token texts must be equal but
for near ties. Also: what a token costs after a long text where no layer attends, and tokens per
second at 64 slots against one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu_step import PEER_EXPERTS, build_ours, build_peer, write_json
from torch import nn

from nemo_hybrid import HybridConfig, HybridLM
from nemo_hybrid.checkpoint.adapter import locate
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.data.tokenizer import load_tokenizer
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model.cache import commit

OURS = "nemo_hybrid"
EQUAL = 0.9
"""Share of texts that must be equal: rounding decides between the best two tokens now and then,
and the rest of a text is another one then."""
SHORT, LONG, AT_ONCE = 1024, 16384, 512
Generate = Callable[[], list[list[int]]]


class Source(NamedTuple):
    """What generates; and a text, as tokens, whose pieces are the prompts. None: random ones."""

    model: HybridLM
    text: list[int] | None = None

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        if self.text is None:
            draw = torch.Generator().manual_seed(batch)
            vocabulary = self.model.config.vocab_size
            return torch.randint(1, vocabulary, (batch, length), generator=draw).tolist()
        apart = len(self.text) // batch
        assert apart >= length, f"the text has {len(self.text)} tokens, too few for the prompts"
        return [self.text[start : start + length] for start in range(0, batch * apart, apart)]


def trained(directory: Path, text: Path) -> Source:
    """A checkpoint, in fp32, and a text file."""
    place = locate(directory)
    (ids,) = load_tokenizer(place).encode([text.read_text()])
    return Source(load_model(place, torch.float32).eval(), ids[:-1].tolist())  # no end of text


def by_us(model: HybridLM, prompts: list[list[int]], new: int, drafts: int = 0) -> Generate:
    requests = [Request(number, ids, new) for number, ids in enumerate(prompts)]

    def run() -> list[list[int]]:
        generator = Generator(model, len(prompts), drafts=drafts)
        found = {r.request.prompt: r.ids for r in generator.run(requests)}
        return [found[number] for number in range(len(prompts))]

    return run


def by_them(model: nn.Module, prompts: list[list[int]], new: int) -> Generate:
    model.generation_config.eos_token_id = None  # to the full length
    ids_BS = torch.tensor(prompts)
    mask_BS = torch.ones_like(ids_BS)

    def run() -> list[list[int]]:
        out_BS = model.generate(
            ids_BS, attention_mask=mask_BS, do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        return out_BS[:, ids_BS.shape[1] :].tolist()

    return run


def timed(run: Generate) -> tuple[float, float]:
    """Seconds of wall clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(runs: Mapping[str, Generate], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, after one round that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if number:
                found[name].append(seconds)
    return {
        name: dict(
            zip(("wall_s", "cpu_s"), map(statistics.median, zip(*times, strict=True)), strict=True)
        )
        for name, times in found.items()
    }


def compare(
    source: Source, batch: int, length: int, new: int, rounds: int, drafts: int = 0
) -> dict[str, Any]:
    """One batch size. Raises AssertionError where the texts are not the same."""
    ours, prompts = source.model, source.prompts(batch, length)
    runs = {OURS: by_us(ours, prompts, new)}
    if drafts:
        runs[f"{OURS}, {drafts} drafts"] = by_us(ours, prompts, new, drafts)
    for experts in PEER_EXPERTS:
        runs[f"transformers ({experts})"] = by_them(build_peer(ours, experts).eval(), prompts, new)
    texts = {name: run() for name, run in runs.items()}
    equal = {
        name: sum(a == b for a, b in zip(theirs, texts[OURS], strict=True)) / batch
        for name, theirs in texts.items()
    }
    assert min(equal.values()) >= EQUAL or batch == 1, f"texts are not the same: {equal}"
    seconds = in_turns(runs, rounds)
    peers = [name for name in runs if not name.startswith(OURS)]
    best = {clock: min(seconds[name][clock] for name in peers) for clock in ("wall_s", "cpu_s")}
    return {
        "batch": batch,
        "tokens": batch * new,
        "equal": min(equal.values()),
        "seconds": seconds,
        "ratio": {clock: best[clock] / seconds[OURS][clock] for clock in best},
    }


@torch.inference_mode()
def cost_of_length(steps: int) -> dict[str, float]:
    """CPU seconds of a token after LONG tokens over those after SHORT, without attention."""
    model = HybridLM(HybridConfig(pattern="MEM-", mtp_num_depths=0)).eval()
    places, caches = {}, model.new_caches(1, LONG)
    ids_BS, count_B = torch.ones(1, AT_ONCE, dtype=torch.int64), torch.tensor([AT_ONCE])
    for read in range(AT_ONCE, LONG + 1, AT_ONCE):
        commit(caches, model.read(ids_BS, count_B, caches)[1])
        if read in (SHORT, LONG):
            places[read] = [layer and type(layer)(**vars(layer)) for layer in caches.layers]
    times: dict[int, list[float]] = {SHORT: [], LONG: []}
    for _ in range(steps):
        for read, layers in places.items():
            caches.layers, began = layers, time.process_time()
            model.decode(ids_BS[:, 0], caches)
            times[read].append(time.process_time() - began)
    return {str(read): statistics.median(seconds) for read, seconds in times.items()}


def table(result: dict[str, Any]) -> str:
    machine, work = result["environment"], result["work"]
    lines = [
        f"CPU generation, greedy, prompts of {work['length']} tokens, {work['new']} new ones, "
        f"{work['threads']} threads, {machine['cpu']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}",
        "",
        "| batch | side | tokens/s | tokens per CPU-s | ours over it, wall | CPU | equal texts |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["batches"]:
        ours = row["seconds"][OURS]
        for name, seconds in row["seconds"].items():
            ratios = [f"{seconds[clock] / ours[clock]:.2f} x" for clock in ("wall_s", "cpu_s")]
            lines.append(
                f"| {row['batch']} | {name} | {row['tokens'] / seconds['wall_s']:.0f} | "
                f"{row['tokens'] / seconds['cpu_s']:.0f} | {' | '.join(ratios)} | "
                f"{row['equal']:.0%} |"
            )
    rates = {
        row["batch"]: row["tokens"] / row["seconds"][OURS]["cpu_s"] for row in result["batches"]
    }
    few, many = min(rates), max(rates)
    short, long = result["length"].values()
    lines += [
        "",
        f"{many} slots against {few}: {rates[many] / rates[few]:.1f} x the tokens per CPU second.",
        f"A token after {LONG} tokens costs {long / short:.2f} x one after {SHORT}, without "
        f"attention ({long * 1e3:.2f} and {short * 1e3:.2f} ms).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that follow it")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafts", type=int, default=0, help="also with so many drafts")
    parser.add_argument("--from", dest="from_", type=Path, help="trained model, for --drafts")
    parser.add_argument("--text", type=Path, help="text file whose pieces --from continues")
    arguments = parser.parse_args()
    if bool(arguments.from_) != bool(arguments.text) or (arguments.drafts and not arguments.from_):
        parser.error("--from and --text go together, and --drafts needs both")
    torch.set_num_threads(arguments.threads)
    work = {k: v for k, v in vars(arguments).items() if k not in ("out", "from_", "text")}
    source = Source(build_ours().eval())
    if arguments.from_:
        source = trained(arguments.from_, arguments.text)
    rows = [
        compare(source, batch, arguments.length, arguments.new, arguments.rounds, arguments.drafts)
        for batch in arguments.batches
    ]
    result = {
        "environment": environment(),
        "work": work,
        "batches": rows,
        "length": cost_of_length(20 * arguments.rounds),
    }
    print(table(result))
    if arguments.out:
        write_json(arguments.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
