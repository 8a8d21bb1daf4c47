"""What every command that loads a model would wait for."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.plans import MODELS

SCRIPT = """
import sys
from pathlib import Path

import torch

from nemo_hybrid import HybridConfig, HybridLM
from nemo_hybrid.checkpoint.load import load
from nemo_hybrid.export.verify import load_exported
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.generation import batched, harness, speculative
from nemo_hybrid.precision.assign import planned

source, out = (Path(sys.argv[1], name) for name in ("model", "export"))
shape = HybridConfig(pattern="MEM*E", vocab_size=64, mtp_num_depths=0)
model = HybridLM(shape, seed=0).to(torch.bfloat16)
model.save_hf(str(source))
loaded, _ = load(source)
assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
assignment = planned(shape, "nvfp4", "conservative", {}, calibrated=False)
export_directory(source, out, assignment, target="nvfp4", show_progress=False)
load_exported(out)
assert "deepspeed" not in sys.modules

from nemo_hybrid.train.loop import _set_determinism

_set_determinism(True)
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
_set_determinism(False)
assert not torch.are_deterministic_algorithms_enabled()
found = sys.modules.keys() & {"sympy", "torch._dynamo", "torch._inductor"}
assert not found, found
"""


def test_torch_imports_no_compiler_for_us(tmp_path: Path) -> None:
    """It takes more than a second, in every process."""
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BRIEF = """
import gc, sys

from nemo_hybrid.cli import main

model, looked = sys.argv[1], []
gc.callbacks.append(lambda phase, _: looked.append(phase))
sys.argv[1:] = ["inspect", model]
assert main() == 0
found = sys.modules.keys() & {"sympy", "torch._dynamo", "deepspeed"}
assert not found, found
sys.argv[1:] = ["plan", "--model", model]
assert main() == 0
assert "deepspeed" not in sys.modules
assert not looked
"""


@pytest.mark.slow
def test_brief_commands_neither_import_deepspeed_nor_look_for_unreachable_objects() -> None:
    """Of what libraries make that takes as long as to import torch."""
    words = [sys.executable, "-c", BRIEF, str(MODELS / "tiny.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
