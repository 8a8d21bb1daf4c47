"""Time `prepare` with a given tokenizer against `datasets.map` with the same one, on equal cores.

    python scripts/prepare_speed.py --mb 64 --rounds 3 --out prepare_speed.json

The corpus is JSON lines of 3,000 characters of the standard library's text. In turns, each in a
fresh process held to one core and to all of them: `nemo-hybrid prepare` (splits, checksums and
sync included), and the fastest usual way of datasets, `load_dataset("json")` and a batched `map`
with as many processes as cores. Both begin behind their imports. Tokens must be equal in number.
Last, the peak memory of `prepare` on the corpus and on one four times as large.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.sources import default_sources
from nemo_hybrid.files import replace_file

CHARACTERS = 3000
OURS, PEER = "nemo_hybrid", "datasets"


def write_corpus(path: Path, size: int) -> None:
    """JSON lines of about ``size`` bytes."""
    texts = [source.path.read_text(errors="ignore") for source in default_sources()]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in texts:
                for start in range(0, len(text), CHARACTERS):
                    file.write(json.dumps({"text": text[start : start + CHARACTERS]}) + "\n")
                if file.tell() >= size:
                    break


def run_ours(corpus: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    """Seconds and tokens."""
    began = time.perf_counter()
    summary = prepare(out, [str(corpus)], tokenizer=str(tokenizer), progress=False)
    return time.perf_counter() - began, sum(summary.tokens.values())


def run_peer(corpus: Path, tokenizer: Path, out: Path, cores: int) -> tuple[float, int]:
    """Seconds and tokens; the mapped data set lies in datasets' cache, below ``out``."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer, split_special_tokens=True)
    end = encode.eos_token_id

    def encoded(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = encode(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[*text, end] for text in ids["input_ids"]]}

    began = time.perf_counter()
    data = load_dataset("json", data_files=str(corpus), cache_dir=str(out), split="train")
    processes = cores if cores > 1 else None
    data = data.map(encoded, batched=True, remove_columns=["text"], num_proc=processes)
    seconds = time.perf_counter() - began
    return seconds, sum(map(len, data["input_ids"]))


def child(arguments: dict[str, Any]) -> None:
    cores = arguments["cores"]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    places = [Path(arguments[name]) for name in ("corpus", "tokenizer", "out")]
    if arguments["side"] == OURS:
        seconds, tokens = run_ours(*places)
    else:
        seconds, tokens = run_peer(*places, cores)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_mib": peak}))


def in_child(**arguments: Any) -> dict[str, Any]:
    """Of one run in a fresh process, whose output goes to a directory that vanishes."""
    with tempfile.TemporaryDirectory(dir=arguments["corpus"].parent) as out:
        call = {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()}
        call["out"] = f"{out}/out"
        # One tokenizer in many processes would want all cores for each of them.
        parallel = str(arguments["side"] == OURS).lower()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(call)],
            env=os.environ | {"TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, mb: int, rounds: int) -> dict[str, Any]:
    corpus, larger, tokenizer = (folder / n for n in ("c.jsonl", "larger.jsonl", "tokenizer"))
    write_corpus(corpus, mb * 10**6)
    prepare(tokenizer, [], progress=False, heldout=0)
    size, cores = corpus.stat().st_size, len(os.sched_getaffinity(0))
    wanted = [(side, n) for n in sorted({1, cores}) for side in (OURS, PEER)]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in wanted}
    for _ in range(rounds):
        for side, n in wanted:
            found = in_child(side=side, cores=n, corpus=corpus, tokenizer=tokenizer)
            runs[side, n].append(found)
            print(f"{side}, {n} cores: {found['seconds']:.1f} s", file=sys.stderr)
    tokens = {run["tokens"] for found in runs.values() for run in found}
    assert len(tokens) == 1, f"the sides disagree about the number of tokens: {tokens}"
    mb_s = {
        f"{side}, {n}": size / 1e6 / statistics.median(run["seconds"] for run in found)
        for (side, n), found in runs.items()
    }
    write_corpus(larger, 4 * size)
    peaks = [
        in_child(side=OURS, cores=cores, corpus=c, tokenizer=tokenizer)["peak_mib"]
        for c in (corpus, larger)
    ]
    return {
        "environment": environment(),
        "bytes": size,
        "cores": cores,
        "rounds": rounds,
        "mb_s": mb_s,
        "speedup": {str(n): mb_s[f"{OURS}, {n}"] / mb_s[f"{PEER}, {n}"] for _, n in wanted},
        "scaling": mb_s[f"{OURS}, {cores}"] / mb_s[f"{OURS}, 1"] / cores,
        "peak_mib": dict(zip(("corpus", "four times"), peaks, strict=True)),
    }


def report(result: dict[str, Any]) -> str:
    machine, cores = result["environment"], result["cores"]
    lines = [
        f"{result['bytes'] / 1e6:.1f} MB, {machine['cpu']}, Python {machine['python']}, median of "
        f"{result['rounds']} in turns",
        *(f"{name} cores: {mb_s:.2f} MB/s" for name, mb_s in result["mb_s"].items()),
        *(f"on {n} cores {ratio:.2f} x datasets.map" for n, ratio in result["speedup"].items()),
        f"{cores} cores give {result['scaling']:.0%} of {cores} times one",
        "peak memory " + ", ".join(f"{k}: {v:.0f} MiB" for k, v in result["peak_mib"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=64, help="size of the corpus in 1e6 bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    if arguments.mb < 1 or arguments.rounds < 1:
        parser.error("--mb and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.mb, arguments.rounds)
    print(report(result))
    if arguments.out:
        replace_file(arguments.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
