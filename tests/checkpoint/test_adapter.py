"""Adapters against PEFT, both ways: what one writes the other one loads, on transformers' NemotronH
with the same weights, and logits and the adapters' gradients agree in fp32.

B is random, as large as A: adapters that compute zero would agree with everything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.nemotron_h_oracle import transformers_twin
from helpers.sabotage import relative
from helpers.tiny_models import (
    decided_model,
    loud_model,
    random_ids,
    smallest_routing_margin,
    tiny_config,
)
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint.adapter import (
    BASE,
    CONFIG,
    WEIGHTS,
    adapter_files,
    base_digest,
    base_directory,
    load_adapter,
    read_adapter,
)
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.cli import main
from nemo_hybrid.commands.import_merge import MergeOptions, merge_command
from nemo_hybrid.config.finetune import LoraOptions
from nemo_hybrid.model.latent_moe import LocalDispatcher
from nemo_hybrid.model.lora import adapters, add_adapters, merge_adapters

TOLERANCE, GRADIENTS = 2e-5, 1e-4
"""Relative, in the norm: twice what rounding eight times as badly moves them."""
MARGIN = 1e-3
SHAPE = tiny_config("ME*-ME", mtp_num_depths=1)
LINEAR = [
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj",
    "shared_experts.down_proj", "fc1_latent_proj", "fc2_latent_proj", "mixer.up_proj",
    "mixer.down_proj",
]  # fmt: skip
BOTH = ["experts.up_proj", "experts.down_proj"]
CASES = {
    "linear": LoraOptions(4, None, LINEAR),
    "one-kind": LoraOptions(3, 1.5, ["in_proj"]),
    "up-stacks": LoraOptions(4, 8, [], ["experts.up_proj"]),
    "down-stacks": LoraOptions(2, 3, ["o_proj"], ["experts.down_proj"]),
    "both-stacks": LoraOptions(4, 8, [], BOTH),
    "all": LoraOptions(4, 8, LINEAR, BOTH),
    "one-layer-of-two": LoraOptions(4, 8, ["backbone.layers.0.mixer.in_proj"],
                                    ["backbone.layers.5.mixer.experts.up_proj"]),
}  # fmt: skip
IDS = random_ids(SHAPE, 2, 21)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Adapters whose part is about a third of their weight's."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = name.endswith(("lora.A", "lora_A.default.weight", "_lora.A"))
            sigma = 0.4 / parameter.shape[-1] ** 0.5 if first else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * sigma)


def adapted_model(options: LoraOptions) -> HybridLM:
    """A model whose choices of experts are not close, with adapters too."""
    for seed in range(50):
        model = decided_model(SHAPE, IDS, MARGIN, seed)
        add_adapters(model, options, seed=1)
        randomize(model)
        if smallest_routing_margin(model, IDS) > MARGIN:
            return model
    raise AssertionError("every model comes too close to another choice of experts")


def bare(model: HybridLM) -> HybridLM:
    """The same model without adapters."""
    plain = HybridLM(model.config)
    weights = {n: t for n, t in model.state_dict().items() if "lora" not in n}
    plain.load_state_dict(weights)
    return plain


def tensors_of(model: HybridLM) -> dict[str, Tensor]:
    return {f"{at}.{n}": p.detach() for at, a in adapters(model) for n, p in a.named_parameters()}


def write(directory: Path, options: LoraOptions, model: HybridLM, base: str = "base") -> Path:
    directory.mkdir()
    text, tensors = adapter_files(options, base, tensors_of(model))
    (directory / CONFIG).write_text(text)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


def peft() -> ModuleType:
    """Imported where it is needed: collecting the tests would take seconds longer."""
    return pytest.importorskip("peft")


def peft_model(model: HybridLM, directory: Path) -> nn.Module:
    loaded: nn.Module = peft().PeftModel.from_pretrained(
        transformers_twin(without_mtp(model)), directory, is_trainable=True
    )
    return loaded


def without_mtp(model: HybridLM) -> HybridLM:
    """Without MTP block, which transformers does not have."""
    plain = HybridLM(replace(model.config, mtp_num_depths=0))
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")}
    plain.load_state_dict({n: t for n, t in weights.items() if "lora" not in n})
    return plain


@torch.no_grad()
def deviation(ours: HybridLM, theirs: nn.Module) -> float:
    return relative(ours(IDS).logits, theirs(IDS, use_cache=False).logits)


def gradients_of(model: nn.Module, logits: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(SHAPE.vocab_size, generator=torch.Generator().manual_seed(3))
    (logits(model).tanh() @ weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    """Gradients are compared under the names of the file: ours are written as an adapter is."""
    options = CASES[case]
    ours = adapted_model(options)
    theirs = peft_model(ours, write(tmp_path / "adapter", options, ours))
    assert deviation(ours, theirs) < TOLERANCE
    # The adapter matters, and so it would be noticed to be wrong.
    assert relative(bare(ours)(IDS).logits, ours(IDS).logits) > 3e-2

    wanted = gradients_of(theirs, lambda m: m(IDS, use_cache=False).logits)
    found = gradients_of(ours, lambda m: m(IDS).logits)
    assert all("lora" in name for name in found)
    _, found = adapter_files(options, "base", found)
    named = {name.replace(".default", ""): grad for name, grad in wanted.items()}
    assert named.keys() == found.keys()
    assert {n: d for n in named if not (d := relative(found[n], named[n])) < GRADIENTS} == {}


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_writes(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    ours = decided_model(SHAPE, IDS, MARGIN)
    config = peft().LoraConfig(
        r=options.rank,
        lora_alpha=options.scale * options.rank,
        target_modules=[name.replace("backbone", "model") for name in options.target_modules],
        target_parameters=[n.replace("backbone", "model") for n in options.target_parameters],
        init_lora_weights=False,
    )
    theirs = peft().get_peft_model(transformers_twin(without_mtp(ours)), config)
    before = theirs(IDS, use_cache=False).logits
    randomize(theirs, seed=2)
    assert relative(theirs(IDS, use_cache=False).logits, before) > 3e-2
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert deviation(ours, theirs) < TOLERANCE
    merge_adapters(ours)
    assert deviation(ours, theirs) < TOLERANCE


def swap_experts(tensors: dict[str, Tensor]) -> None:
    A = next(t for name, t in tensors.items() if "experts.up_proj_lora.A" in name)
    A[[0, 1]] = A[[1, 0]].clone()


def mix_ranks_and_experts(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "experts.up_proj_lora.B" in name)
    experts, size, rank = tensors[name].shape
    tensors[name] = tensors[name].permute(1, 0, 2).reshape(size, rank, experts).permute(2, 0, 1)


def transpose_values(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "q_proj.lora.A" in name)
    tensors[name] = tensors[name].reshape(tensors[name].shape[::-1]).T


@pytest.mark.parametrize("mistake", [swap_experts, mix_ranks_and_experts, transpose_values])
def test_the_comparison_notices_mistakes(
    mistake: Callable[[dict[str, Tensor]], None], tmp_path: Path
) -> None:
    options = CASES["all"]
    ours = adapted_model(options)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(ours).items()}
    mistake(tensors)
    with patch(f"{__name__}.tensors_of", return_value=tensors):
        theirs = peft_model(ours, write(tmp_path / "adapter", options, ours))
    assert deviation(ours, theirs) > 1e-3
    right = peft_model(ours, write(tmp_path / "scaled", replace(options, alpha=9.0), ours))
    assert deviation(ours, right) > 1e-3


@contextmanager
def guard_lifted() -> Iterator[None]:
    with patch("peft.tuners.tuners_utils._check_lora_target_modules_mamba"):
        yield


def test_peft_refuses_out_proj_aloud_and_would_compute_what_we_do(tmp_path: Path) -> None:
    """Its fused kernels take the bare weight of out_proj; without them the adapter is right."""
    options = LoraOptions(4, None, ["out_proj", "q_proj"])
    ours = adapted_model(options)
    directory = write(tmp_path / "adapter", options, ours)
    with pytest.raises(ValueError, match="out_proj"):
        peft_model(ours, directory)
    with guard_lifted():
        theirs = peft_model(ours, directory)
    assert deviation(ours, theirs) < TOLERANCE


def test_adapters_of_the_mtp_block_are_kept_and_do_not_disturb_peft(tmp_path: Path) -> None:
    options = LoraOptions(4, 8, ["q_proj", "mtp.*"], ["*.experts.up_proj", "mtp.*.up_proj"])
    ours = adapted_model(options)
    in_mtp = [name for name in tensors_of(ours) if name.startswith("mtp.")]
    assert {"mtp.layers.0.eh_proj.lora.A", "mtp.layers.1.mixer.experts.up_proj_lora.B"} < {*in_mtp}
    directory = write(tmp_path / "adapter", options, ours)
    assert deviation(ours, peft_model(ours, directory)) < TOLERANCE
    again = bare(ours)
    load_adapter(again, directory)
    assert tensors_of(again).keys() == tensors_of(ours).keys()
    logits = ours(IDS, mtp=True).mtp_logits[0]
    assert torch.equal(again(IDS, mtp=True).mtp_logits[0], logits)
    assert relative(bare(ours)(IDS, mtp=True).mtp_logits[0], logits) > 3e-2


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    options = LoraOptions(4, 6.5, ["q_proj", "in_proj", "mtp.*.eh_proj"], BOTH)
    ours = adapted_model(options)
    stored = read_adapter(write(tmp_path / "adapter", options, ours, "/some/where"))
    wanted = tensors_of(ours)
    assert stored.base == "/some/where"
    assert (stored.options.rank, stored.options.scale) == (4, 6.5 / 4)
    assert stored.tensors.keys() == wanted.keys()
    assert all(torch.equal(stored.tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("owned", [range(0, 4), range(4, 8), range(6, 8)])
def test_a_part_of_the_experts_takes_its_slices(owned: range, tmp_path: Path) -> None:
    options = CASES["all"]
    whole = adapted_model(options)
    directory = write(tmp_path / "adapter", options, whole)
    dispatcher = LocalDispatcher(len(owned))
    dispatcher.owned = owned
    part = HybridLM(SHAPE, dispatcher=dispatcher)
    load_adapter(part, directory)
    wanted = tensors_of(whole)
    for name, tensor in tensors_of(part).items():
        mine = wanted[name][owned.start : owned.stop] if ".experts." in name else wanted[name]
        assert torch.equal(tensor, mine), name


Settings = dict[str, Any]
Change = Callable[[Settings, dict[str, Tensor]], None]


def setting(name: str, value: object) -> Change:
    return lambda settings, tensors: settings.update({name: value})


def without(ending: str) -> Change:
    def change(settings: Settings, tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ending)]:
            del tensors[name]

    return change


def renamed(old: str, new: str) -> Change:
    def change(settings: Settings, tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if old in name:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def resized(ending: str, *shape: int) -> Change:
    def change(settings: Settings, tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ending)]:
            tensors[name] = torch.zeros(shape)

    return change


Q = "layers.2.mixer.q_proj"
BAD: dict[str, tuple[Change, str]] = {
    "no-lora": (setting("peft_type", "LOHA"), "peft_type"),
    "dora": (setting("use_dora", True), "use_dora"),
    "rslora": (setting("use_rslora", True), "use_rslora"),
    "bias": (setting("bias", "all"), "bias"),
    "lora-bias": (setting("lora_bias", True), "lora_bias"),
    "saved-modules": (setting("modules_to_save", ["lm_head"]), "modules_to_save"),
    "ranks": (setting("rank_pattern", {"q_proj": 8}), "rank_pattern"),
    "alphas": (setting("alpha_pattern", {"q_proj": 8}), "alpha_pattern"),
    "pissa": (setting("init_lora_weights", "pissa"), "init_lora_weights"),
    "from-the-future": (setting("use_something", {"new": 1}), "use_something"),
    "rank": (setting("r", 5), "rank 5"),
    "no-rank": (setting("r", None), "r is None"),
    "alpha": (setting("lora_alpha", "8"), "lora_alpha"),
    "no-counterpart": (without(f"{Q}.lora_B.weight"), f"{Q}.lora_A.weight has no counterpart"),
    "missing": (without(f"{Q}.lora_A.weight"), "has no counterpart"),
    "missing-pair": (renamed("2.mixer.q_proj", "2.mixer.o_proj"), "q_proj, of which"),
    "unexpected": (renamed(f"{Q}.lora_A", f"{Q}.lora_magnitude_vector"), "magnitude_vector"),
    "elsewhere": (renamed(Q, "layers.9.mixer.q_proj"), "no backbone.layers.9.mixer.q_proj"),
    "not-its-stack": (setting("target_parameters", []), "target_parameters does not say"),
    "width": (resized(f"{Q}.lora_A.weight", 4, 33), "width 32"),
    "experts": (resized("layers.1.mixer.experts.lora_A.weight", 28, 16), "8 experts"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_plain_lora_or_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    options = LoraOptions(4, 8, ["q_proj"], ["experts.up_proj"])
    ours = loud_model(SHAPE)
    add_adapters(ours, options, seed=1)
    directory = write(tmp_path / "adapter", options, ours)
    load_adapter(bare(ours), directory)
    settings, tensors = json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)
    change(settings, tensors)
    (directory / CONFIG).write_text(json.dumps(settings))
    save_file(tensors, directory / WEIGHTS)
    fresh = bare(ours)
    with pytest.raises(UserError, match=message):
        load_adapter(fresh, directory)
    assert not list(adapters(fresh))
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        read_adapter(tmp_path)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[HybridLM, Path, Path]:
    """An adapted model, and the directories of its base and of its adapter."""
    root = tmp_path_factory.mktemp("adapted")
    ours = adapted_model(CASES["all"])
    bare(ours).save_hf(str(root / "base"))
    (root / "base" / "tokenizer.json").write_text("{}")
    (root / "base" / "chat_template.jinja").write_text("of the base")
    (root / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    write(root / "adapter", CASES["all"], ours, "../base")
    (root / "adapter" / "chat_template.jinja").write_text("of the adapter")
    return ours, root / "base", root / "adapter"


def test_an_adapter_loads_as_the_model_that_it_makes(
    merged: tuple[HybridLM, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, base, directory = merged
    model = load_model(directory)
    assert not list(adapters(model))
    assert relative(model(IDS).logits, ours(IDS).logits) < TOLERANCE
    assert relative(load_model(base)(IDS).logits, ours(IDS).logits) > 3e-2
    assert main(["inspect", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "backbone.layers.*.mixer.experts.up_proj" in shown
    assert "../base" in shown


def test_merge_writes_a_whole_model(merged: tuple[HybridLM, Path, Path], tmp_path: Path) -> None:
    ours, base, directory = merged
    out = tmp_path / "out"
    merge_command(MergeOptions(from_=str(directory), out=str(out)))
    assert f"with the LoRA adapter `{directory.name}`" in (out / "README.md").read_text()
    assert relative(load_model(out)(IDS).logits, ours(IDS).logits) < TOLERANCE
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "chat_template.jinja").read_text() == "of the adapter"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert not (out / CONFIG).exists()
    with pytest.raises(UserError, match="not empty"):
        merge_command(MergeOptions(from_=str(directory), out=str(out)))
    with pytest.raises(UserError, match="whole model already"):
        merge_command(MergeOptions(from_=str(base), out=str(tmp_path / "other")))


def test_a_bf16_base_is_rounded_once(merged: tuple[HybridLM, Path, Path], tmp_path: Path) -> None:
    """The adapter, which the file holds in fp32, is not."""
    ours, base, directory = merged
    HybridLM.from_hf(str(base)).bfloat16().save_hf(str(tmp_path / "bf16"))
    merge_command(
        MergeOptions(from_=str(directory), out=str(tmp_path / "out"), base=str(tmp_path / "bf16"))
    )
    model, weights = load_model(tmp_path / "out"), dict(bare(ours).named_parameters())
    found = dict(model.named_parameters())
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    for at, adapter in adapters(ours):
        name = at.removesuffix(".lora") + ".weight" if at.endswith(".lora") else at[:-5]
        wanted = weights[name].bfloat16().double()
        wanted = wanted + adapter.scale * (adapter.B.double() @ adapter.A.double())
        assert found[name].dtype == torch.bfloat16
        # Half a unit in the last place of bf16, and what fp32 sums lose.
        error = (found[name].double() - wanted).abs()
        assert (error <= wanted.abs() * 2**-8 * 1.0001 + 1e-7).all(), name


def test_other_weights_are_merged_by_force_alone(
    merged: tuple[HybridLM, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether they are given or stand where the adapter's own were; its digest is not shown."""
    _, base, directory = merged
    for source, name in ((base, "base"), (directory, "adapter")):
        shutil.copytree(source, tmp_path / name)
    digest = base_digest(base)
    (tmp_path / "adapter" / BASE).write_text(json.dumps({"digest": digest}))
    words = ["merge", "--from", f"{tmp_path}/adapter", "--out"]
    assert main([*words, f"{tmp_path}/same"]) == 0
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    loud_model(SHAPE, seed=9).save_hf(str(tmp_path / "drawn"))
    for file in (tmp_path / "drawn").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "other")
    given = [*words, f"{tmp_path}/given", "--base", f"{tmp_path}/other"]
    assert main(given) == 2
    shutil.copytree(tmp_path / "other", tmp_path / "base", dirs_exist_ok=True)
    assert main([*words, f"{tmp_path}/named"]) == 2
    for said in capsys.readouterr().err.splitlines():
        assert "trained beside other weights than those in" in said
        assert "it names ../base" in said
        assert "--force true" in said
        assert digest not in said
    assert not (tmp_path / "given").exists()
    assert main([*given, "--force", "true"]) == 0
    assert "trained beside other weights" in caplog.text


def test_a_base_that_is_gone_is_named(
    merged: tuple[HybridLM, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, directory = merged
    alone = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(directory, alone)
    with pytest.raises(UserError, match=r"\.\./base, which .* names, is not there.*--base"):
        load_model(alone)
    settings = json.loads((alone / CONFIG).read_text())
    settings["base_model_name_or_path"] = "/runs/a/checkpoints/step_00000004"
    (alone / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is not there any more: runs remove their older"):
        load_model(alone)
    shutil.copy(directory / CONFIG, alone)
    with pytest.raises(UserError, match="nowhere, which --base names"):
        base_directory(alone, "nowhere")
    with pytest.raises(UserError, match="is an adapter too"):
        base_directory(alone, str(directory))
    assert base_directory(alone, str(base)) == base
    (base.parent / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(base.parent / "work")  # relative to the working directory, as PEFT takes it
    assert base_directory(alone).samefile(base)
