"""Our adapter to lm-eval against lm-eval's own backend for transformers, on the same weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.chats import TEMPLATE
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.cli import main
from nemo_hybrid.commands.harness import HarnessOptions, _open
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.tokenizer import train_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.verify import load_exported
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.precision.assign import assign

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.slow  # what lm-eval imports

TEXTS = [
    "the cat sat on the mat and ran",
    "def add(a, b):\n    return a + b\n",
    "one two three four",
]
LONGEST = 32
PAIRS = [
    ("the cat", " sat"),
    ("the cat ", "sat on"),  # a blank that moves to what is asked about
    ("", "the mat"),
    ("one two three four " * 9, "one two"),  # beyond the model's length
    ("def add(a, b):\n", "    return a + b\n"),
    ("</s>the", " cat"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "model"
    tokenizer = train_tokenizer(TEXTS * 4, 280)
    config = tiny_config(
        "ME*-", vocab_size=tokenizer.vocab_size, max_position_embeddings=LONGEST, mtp_num_depths=1
    )
    loud_model(config).save_hf(str(out))
    for name, content in tokenizer.files.items():
        (out / name).write_bytes(content)
    return out


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    """lm-eval's backend, without transformers' limit on time steps."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(directory, dtype="float32")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")


def ours(directory: Path, **changed: Any) -> Any:
    return _open(HarnessOptions(from_=str(directory), tasks="", **changed))


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_log_likelihoods_are_those_of_the_backend_for_transformers(
    directory: Path, theirs: Any
) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    for row_tokens in (1, 4096):  # one by one, and packed
        found = ours(directory, row_tokens=row_tokens).loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-4, abs=1e-4)
    # A token earlier or later would show.
    assert len({round(x, 2) for x, _ in wanted}) == len(PAIRS)
    texts = [asked(text) for text in (TEXTS[1] * 5, "cat")]
    rolled = ours(directory).loglikelihood_rolling(texts)
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4)


def test_what_is_longer_than_the_model_is_refused(directory: Path) -> None:
    with pytest.raises(UserError, match=r"asks about \d+ tokens at once, and the model is"):
        ours(directory).loglikelihood([asked("the", " cat" * 40)], disable_tqdm=True)


def test_what_is_most_probable_is_greedy(directory: Path) -> None:
    model = ours(directory)
    (said,) = model.generate_until([asked("the cat", {"max_gen_toks": 5})])
    ((_, greedy), (_, other)) = model.loglikelihood(
        [asked("the cat", said), asked("the cat", " sat")], disable_tqdm=True
    )
    assert (greedy, other) == (True, said.startswith(" sat"))


@pytest.mark.parametrize("drafts", [0, 3])
def test_answers_are_those_of_the_backend_for_transformers(
    directory: Path, theirs: Any, drafts: int
) -> None:
    given = {"max_gen_toks": 12, "until": ["e"]}
    requests = [asked(text, given) for text in ("the cat", "one two " * 20, "def")]
    wanted = theirs.generate_until(requests, disable_tqdm=True)
    assert any(wanted)
    assert ours(directory, speculate=drafts).generate_until(requests) == wanted
    free = [asked("the cat", {"max_gen_toks": 12})]
    assert ours(directory).generate_until(free)[0].startswith(wanted[0])


def test_what_a_task_cannot_have_is_refused(directory: Path) -> None:
    for given, why in (
        ({"num_beams": 4}, "wants its answers with {'num_beams': 4}, which cannot be had"),
        ({"max_gen_toks": LONGEST}, f"wants {LONGEST} tokens, and the model is declared for 32"),
    ):
        with pytest.raises(UserError) as error:
            ours(directory).generate_until([asked("the", given)])
        assert why in str(error.value)


def test_conversations_are_those_of_the_backend_for_transformers(
    directory: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    theirs = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model"), chat_template_args={}
    )
    model = ours(tmp_path / "model")
    talk = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    for messages, asks in ((talk[:1], True), (talk, False)):
        wanted = HFLM.apply_chat_template(theirs, messages, asks)
        assert model.apply_chat_template(messages, asks) == wanted
        assert model.tok_encode(wanted) == theirs.tokenizer.encode(wanted)
    assert model.chat_template(True) == TEMPLATE


def test_thinking_is_left_out_where_that_is_asked(directory: Path) -> None:
    assert ours(directory).closing is None
    assert ours(directory, thinking="strip").closing == "</think>"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"q": "the cat", "choices": [" sat", " two", " def"], "gold": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{gold}}'\ndoc_to_choice: '{{choices}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}]\nmetadata: {version: 2.5}\n"
    )
    return tmp_path / "mine.yaml"


@pytest.mark.sweep
def test_command(
    directory: Path, task: Path, tmp_path: Path, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    out = tmp_path / "scores.json"
    words = ["harness", "--from", str(directory), "--tasks", str(task), "--out", str(out)]
    assert main(words) == 0
    written = json.loads(out.read_text())
    wanted = simple_evaluate(
        model=theirs, tasks=["mine"], task_manager=TaskManager(include_path=str(task.parent))
    )
    assert wanted is not None
    assert written["results"]["mine"]["acc,none"] == wanted["results"]["mine"]["acc,none"]
    assert written["versions"] == {"mine": 2.5}
    assert main(words) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert main([*words[:4], "nowhere", "--out", str(tmp_path / "x")]) == 2
    assert "lm-eval has no task nowhere" in capsys.readouterr().err


def test_an_export_is_scored_by_its_dequantized_weights(directory: Path, tmp_path: Path) -> None:
    shape, out = HybridConfig.from_hf(directory), tmp_path / "export"
    assignment = assign(shape, None, {"*.mixer.in_proj": "nvfp4_w4a16"})
    export_directory(directory, out, assignment, target="nvfp4", show_progress=False)
    before, asked = [5, 6], [7, 8]
    logits_SV = load_exported(out)(torch.tensor([before + asked])).logits[0].double()
    wanted = logits_SV.log_softmax(-1)[[1, 2], asked].sum().detach()
    (found,), (other,) = (
        ours(place)._loglikelihood_tokens([(None, before, asked)]) for place in (out, directory)
    )
    torch.testing.assert_close(torch.tensor(found[0]).double(), wanted, rtol=1e-5, atol=1e-5)
    assert abs(other[0] - float(wanted)) > 1e-3
