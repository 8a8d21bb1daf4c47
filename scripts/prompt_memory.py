#!/usr/bin/env python3
"""What reading a long prompt takes: nothing that grows with it but keys and values.

A tiny model reads prompts of several lengths as generating does, each in a process of its own on a
CPU. Prints the memory that the reading took at its peak, its keys and values in that, and the rest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LENGTHS = (8192, 32_768, 131_072)
PAGES = Path("/proc/self/clear_refs")


def peak() -> int:
    """The most resident bytes since the last reset."""
    (line,) = (n for n in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in n)
    return int(line.split()[1]) * 1024


def measure(length: int) -> None:
    import ctypes

    import torch

    from nemo_hybrid.commands.memory import sequence_memory
    from nemo_hybrid.config.hf import HybridConfig
    from nemo_hybrid.generation.batched import Generator, Request
    from nemo_hybrid.model.hybrid import HybridLM

    # Memory is given back at once: what was freed shall not count.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    torch.set_num_threads(1)
    shape = HybridConfig(
        pattern="ME*M*", vocab_size=1024, hidden_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=32,
        ssm_state_size=32, n_groups=2, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=128, moe_latent_size=64, moe_shared_expert_intermediate_size=128,
        mtp_num_depths=0,
    )  # fmt: skip
    model = HybridLM(shape)

    def read(tokens: int) -> None:
        ids = torch.arange(tokens).remainder(shape.vocab_size).tolist()
        list(Generator(model, 1).run([Request(0, ids, 1)]))

    read(4096)
    PAGES.write_text("5")  # resets the peak
    before = peak()
    read(length)
    kept = sequence_memory(shape, 4)
    print(peak() - before, kept.at(length) - kept.fixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure(words.measure)
        return
    print(f"{'tokens':>9} {'taken':>10} {'keys and values':>16} {'the rest':>10}")
    for length in words.lengths:
        command = [sys.executable, __file__, "--measure", str(length)]
        taken, kept = map(int, subprocess.check_output(command).split())
        parts = (taken, kept, taken - kept)
        print(f"{length:9,} {parts[0] / 1e6:7.1f} MB {parts[1] / 1e6:13.1f} MB "
              f"{parts[2] / 1e6:7.1f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
