"""What a quantized export costs: time, memory, and how far the model moves.

    python scripts/export_figures.py --model DIR --data STORE [--out FILE] [--dir DIR] [--gb N]

Throughput: a checkpoint of random BF16 weights of at least --gb is exported to NVFP4, and, in
turns, copied file by file by the safetensors library, with fsync; each time in a new process, which
gives its peak resident memory. The rate is that of the bytes read. Divergence: --model, a trained
model, is exported in every preset and with every kind of scales, and runs on held-out text of
--data: KL divergence and perplexity with weights rounded alone, and with inputs of products rounded
too. Sensitivity: how long measuring it takes. Recovery: what distillation for preset nano on text
of --data brings back of the divergence.

Exit status: 0 done, 1 a process failed, 2 a mistake in options or files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import replace_file, sync_directory
from nemo_hybrid.terminal import print_table

PRESETS = (
    ("conservative", "nvfp4", "amax"),
    ("super", "mixed", "amax"),
    ("nano", "nvfp4", "amax"),
    ("ultra", "mixed", "four_over_six"),
    ("super", "fp8", "amax"),
)
"""Preset, target, scales. The last: what Super quantizes, all of it in FP8."""
SCALES = ("amax", "mse", "four_over_six", "training")
PIECE = 512
DISTILLED, STEP_TOKENS = 256, 2048  # of a row and of a step of distillation
EXPERT_BYTES = 2 * 2 * 1024 * 1024  # up and down projection of one expert below


def worker(kind: str, source: Path, out: Path) -> dict[str, float]:
    """One measurement; call it in a process of its own."""
    from safetensors.torch import load_file, save_file

    from nemo_hybrid.config.hf import HybridConfig
    from nemo_hybrid.export.write import export_directory
    from nemo_hybrid.precision.assign import planned

    shape = HybridConfig.from_hf(str(source))
    imported = _resident("VmRSS")
    began = time.perf_counter()
    if kind == "plain":
        out.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            save_file(load_file(path), out / path.name)
            with open(out / path.name, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(out)
    else:
        assignment = planned(shape, "nvfp4", "conservative", {}, calibrated=False)
        export_directory(
            source, out, assignment, target="nvfp4", search=kind, show_progress=False,  # type: ignore[arg-type]
        )  # fmt: skip
    return {
        "seconds": time.perf_counter() - began,
        "peak_mib": _resident("VmHWM"),
        "imported_mib": imported,
    }


def _resident(what: str) -> float:
    """MiB of this process, now or at most; getrusage would count the parent's from before exec."""
    status = Path("/proc/self/status").read_text()
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what)) / 1024
    )


def throughput(place: Path, gb: float, repeat: int, pause: float) -> dict[str, Any]:
    import torch

    from nemo_hybrid import HybridLM
    from nemo_hybrid.config.hf import HybridConfig

    experts = math.ceil(gb * 1e9 / EXPERT_BYTES / 2)
    shape = HybridConfig(
        pattern="MEM*E", vocab_size=1024, hidden_size=1024, n_routed_experts=experts,
        moe_intermediate_size=1024, moe_latent_size=1024, mtp_num_depths=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = HybridLM(shape).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    model.save_hf(str(place / "source"))
    del model
    size = sum(path.stat().st_size for path in (place / "source").glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {"plain": [], "amax": [], "four_over_six": []}
    for turn in range(repeat):
        kinds = list(found)
        for kind in kinds if turn % 2 else kinds[::-1]:
            os.sync()
            time.sleep(pause)  # virtual disks slow down after a burst
            out = place / "out"
            done = subprocess.run(
                [sys.executable, __file__, "--worker", kind, str(place / "source"), str(out)],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{kind}: {done.stderr}")
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
            written = sum(path.stat().st_size for path in out.iterdir())
            found[kind][-1]["bytes_written"] = written
            shutil.rmtree(out)
            print(f"round {turn + 1} of {repeat}: {kind} {found[kind][-1]}", flush=True)
    shutil.rmtree(place / "source")
    middle = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in found.items()
    }
    for row in middle.values():
        row["mb_per_s"] = size / 1e6 / row["seconds"]
    return {"bytes": size, "rounds": found, "median": middle}


def divergence(model: Path, data: str, place: Path, tokens: int, calibration: int) -> list[Any]:
    """KL divergence and perplexity of every export of the trained model."""
    import torch

    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.export.calibrate import calibrate, read_pieces
    from nemo_hybrid.export.verify import load_exported, states
    from nemo_hybrid.export.write import export_directory
    from nemo_hybrid.precision.assign import planned

    source = load_model(model, torch.float32)
    pieces = read_pieces(data, model, source.config, tokens, "heldout", PIECE)
    seen = calibrate(source, read_pieces(data, model, source.config, calibration))
    before = states(source, pieces, "source")
    rows = []
    cases = [*PRESETS, *(("conservative", "nvfp4", scales) for scales in SCALES[1:])]
    for preset, target, scales in [("bf16", "bf16", "amax"), *cases]:
        name = "conservative" if preset == "bf16" else preset
        assignment = planned(source.config, target, name, {}, calibrated=True)
        out = place / f"{preset}-{target}-{scales}"
        facts = export_directory(
            model, out, assignment, target=target, search=scales,  # type: ignore[arg-type]
            calibration=None if target == "bf16" else seen, show_progress=False,
        )  # fmt: skip
        exported = load_exported(out)
        costs = _costs(before, exported, assignment, seen.amax, pieces)
        rows.append(
            {
                "preset": preset, "target": target, "scales": scales,
                "size_ratio": facts.bytes_after / facts.bytes_before,
                **costs, "weight_errors": facts.errors,
            }
        )  # fmt: skip
    return rows


def _costs(before: Any, exported: Any, assignment: Any, amax: Any, pieces: Any) -> dict[str, Any]:
    """What rounding costs, of weights alone, and of inputs too."""
    from nemo_hybrid.export.verify import compare, states
    from nemo_hybrid.precision.simulate import quantized_inputs

    weights = compare(before, states(exported, pieces, "export"), pieces)
    with quantized_inputs(exported, assignment, amax):
        both = compare(before, states(exported, pieces, "export"), pieces)
    return {
        "kl_weights": float(weights.kl_T.mean()),
        "perplexity": math.exp(-weights.b_T.mean()),
        "kl_with_inputs": float(both.kl_T.mean()),
        "perplexity_with_inputs": math.exp(-both.b_T.mean()),
        "source_perplexity": math.exp(-weights.a_T.mean()),
        "tokens": len(weights.a_T),
    }


def sensitivity(model: Path, data: str, tokens: int) -> dict[str, Any]:
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.export.calibrate import read_pieces
    from nemo_hybrid.export.sensitivity import measure

    source = load_model(model)
    pieces = read_pieces(data, model, source.config, tokens)
    began = time.perf_counter()
    found = measure(source, pieces)
    return {
        "seconds": time.perf_counter() - began,
        "tokens": sum(piece.numel() for piece in pieces),
        "groups": len(found),
        "formats": len(found[0].kl),
    }


def recovery(model: Path, data: str, place: Path, steps: int, tokens: int) -> dict[str, Any]:
    """What distillation for preset nano brings back: exports of the model before and after it."""
    import torch

    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.export.calibrate import calibrate, read_pieces
    from nemo_hybrid.export.verify import load_exported, states
    from nemo_hybrid.export.write import export_directory
    from nemo_hybrid.precision.assign import planned

    source = load_model(model, torch.float32)
    learnt = read_pieces(data, model, source.config, steps * STEP_TOKENS, length=DISTILLED)
    with open(place / "text.jsonl", "w") as file:
        for ids in (ids_1S[0].tolist() for ids_1S in learnt if ids_1S.shape[1] > 1):
            pack = {"input_ids": ids, "loss_mask": [1] * len(ids), "seq_start_id": [0]}
            file.write(json.dumps(pack) + "\n")
    options = {
        "model.from_hf": model,
        "run_dir": place / "run",
        "data.path": place / "text.jsonl",
        "data.packed_mask": "tokens",
        "data.sequence_length": DISTILLED,
        "data.heldout": 0,
        "train.eval_sequences": 0,
        "train.max_steps": steps,
        "train.global_batch_size": STEP_TOKENS // DISTILLED,
        "train.micro_batch_size": 4,
        "train.lr": 1e-4,
        "train.mtp_loss_weight": 0,
        "train.schedule": "cosine",
        "train.warmup_steps": steps // 10,
        "precision.recipe": "fp32",
        "distill.preset": "nano",
    }
    words = [word for name, given in options.items() for word in (f"--{name}", str(given))]
    began = time.perf_counter()
    if subprocess.run([sys.executable, "-m", "nemo_hybrid", "finetune", *words]).returncode:
        raise RuntimeError("finetune failed")
    seconds = time.perf_counter() - began
    pieces = read_pieces(data, model, source.config, tokens, "heldout", PIECE)
    calibration = read_pieces(data, model, source.config, tokens)
    before = states(source, pieces, "source")
    assignment = planned(source.config, "nvfp4", "nano", {}, calibrated=True)
    found: dict[str, Any] = {"steps": steps, "step_tokens": STEP_TOKENS, "seconds": seconds}
    for name, directory in {"before": model, "after": place / "run" / "model"}.items():
        seen = calibrate(load_model(directory, torch.float32), calibration)
        out = place / f"distilled-{name}"
        export_directory(
            directory, out, assignment, target="nvfp4", calibration=seen, show_progress=False
        )
        exported = load_exported(out)
        found[name] = _costs(before, exported, assignment, seen.amax, pieces)
    return found


def report(result: dict[str, Any]) -> None:
    if "throughput" in result:
        median = result["throughput"]["median"]
        print_table(
            ("", "MB/s read", "of plain", "peak MiB", "of it before", "bytes written"),
            [
                (
                    kind,
                    f"{row['mb_per_s']:.0f}",
                    f"{row['mb_per_s'] / median['plain']['mb_per_s']:.2f}",
                    f"{row['peak_mib']:.0f}",
                    f"{row['imported_mib']:.0f}",
                    f"{row['bytes_written'] / result['throughput']['bytes']:.3f}",
                )
                for kind, row in median.items()
            ],
            title="Export against a plain copy; bytes written as a share of those read",
        )
    print_table(
        ("preset, target, scales", "size", "KL", "ppl", "KL, inputs too", "ppl"),
        [
            (
                f"{row['preset']}, {row['target']}, {row['scales']}",
                f"{row['size_ratio']:.3f}",
                f"{row['kl_weights']:.2e}",
                f"{row['perplexity']:.3f}",
                f"{row['kl_with_inputs']:.2e}",
                f"{row['perplexity_with_inputs']:.3f}",
            )
            for row in result["divergence"]
        ],
        title=f"source: perplexity {result['divergence'][0]['source_perplexity']:.3f}",
    )
    for row in result["divergence"]:
        for family, errors in row["weight_errors"].items():
            shown = ", ".join(f"{error:.4f} with {scales}" for scales, error in errors.items())
            print(f"{row['preset']}: relative error of {family}: {shown}")
    if "recovery" in result:
        found = result["recovery"]
        for name in ("before", "after"):
            row = found[name]
            print(
                f"nano {name} {found['steps']} steps of distillation: KL {row['kl_weights']:.2e}, "
                f"inputs too {row['kl_with_inputs']:.2e}, ppl {row['perplexity_with_inputs']:.3f}"
            )
    took = result["sensitivity"]
    print(
        f"sensitivity of {took['groups']} groups in {took['formats']} formats on {took['tokens']} "
        f"tokens: {took['seconds']:.1f} s"
    )


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        kind, source, out = sys.argv[2:]
        print(json.dumps(worker(kind, Path(source), Path(out))))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="run or checkpoint of a trained model")
    parser.add_argument("--data", required=True, help="its token store")
    parser.add_argument("--dir", help="directory on the disk to measure; default: temporary files")
    parser.add_argument("--gb", type=float, default=2.0, help="0: no throughput")
    parser.add_argument("--repeat", type=int, default=4, help="even: each goes first as often")
    parser.add_argument("--pause", type=float, default=10, help="seconds of rest for the disk")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--calibration_tokens", type=int, default=65536)
    parser.add_argument("--distill_steps", type=int, default=200, help="0: no distillation")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    a = parser.parse_args()
    result: dict[str, Any] = {"environment": environment()}
    try:
        from nemo_hybrid.checkpoint.steps import resolve

        model = resolve(a.model)
        with tempfile.TemporaryDirectory(dir=a.dir) as directory:
            place = Path(directory)
            result["divergence"] = divergence(model, a.data, place, a.tokens, a.calibration_tokens)
            result["sensitivity"] = sensitivity(model, a.data, a.tokens)
            if a.distill_steps:
                result["recovery"] = recovery(model, a.data, place, a.distill_steps, a.tokens)
            if a.gb:
                result["throughput"] = throughput(place, a.gb, a.repeat, a.pause)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(result)
    if a.out:
        replace_file(a.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
