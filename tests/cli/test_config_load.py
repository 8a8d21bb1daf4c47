"""Configuration files and overrides: merging, paths, types, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.config.read import dump_config, flatten, key_types, load_config, read_keys
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.errors import UserError


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load_config([folder / "run.yaml"], overrides)


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_the_dataclasses(tmp_path: Path) -> None:
    loaded, default = asdict(load(tmp_path, "")), asdict(RunConfig())
    loaded.pop("run_dir")
    default.pop("run_dir")
    assert loaded == default


def test_files_merge_in_order_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {lr: 1, max_steps: 2, seed: 3}")
    (tmp_path / "b.yaml").write_text("train: {max_steps: 20, seed: 30}\nmodel: {hidden_size: 8}")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    config = load_config(files, ["--train.seed", "300", "--model.pattern", "ME*"])
    assert (config.train.lr, config.train.max_steps, config.train.seed) == (1.0, 20, 300)
    assert (config.model.hidden_size, config.model.pattern) == (8, "ME*")
    assert load_config(files[::-1]).train.max_steps == 2


def test_tokens_count_in_place_of_steps(tmp_path: Path) -> None:
    """The later of the two counts; what is saved holds steps alone."""
    text = (
        "train: {max_tokens: 1e6, warmup_tokens: 0, decay_tokens: 250001, global_batch_size: 10}\n"
        "data: {sequence_length: 100}"
    )
    config = load(tmp_path, text)
    train = config.train
    assert (train.max_steps, train.warmup_steps, train.decay_steps) == (1000, 0, 251)
    assert (train.max_tokens, train.warmup_tokens, train.decay_tokens) == (None, None, None)
    assert load(tmp_path, text, "--train.global_batch_size", "20").train.max_steps == 500
    assert load(tmp_path, text, "--train.max_steps", "7").train.max_steps == 7
    assert (
        load(tmp_path, "train: {max_steps: 7}", "--train.max_tokens", "4097").train.max_steps == 2
    )
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "saved.yaml"]).train == train
    assert (
        load_config([tmp_path / "saved.yaml"], ["--train.max_tokens", "3e6"]).train.max_steps
        == 3000
    )
    assert "give train.max_tokens or train.max_steps, not both" in message(
        tmp_path, "train: {max_steps: 7, max_tokens: 5}"
    )
    assert "train.max_tokens must be positive" in message(tmp_path, "train: {max_tokens: 0}")
    # 10 steps of 1,000 tokens, 25 of 2,000, then 4,000; the decay is one of full batches.
    growing = text.replace("size: 10", "size: 40, batch_warmup: {1e4: 10, 5.9e4: 20}")
    train = load(tmp_path, growing, "--train.warmup_tokens", "11e3").train
    assert (train.max_steps, train.warmup_steps, train.decay_steps) == (10 + 25 + 235, 11, 63)


def test_section_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    tiny = tmp_path / "model/tiny.yaml"
    tiny.write_text("hidden_size: 128\nhead_dim: 32\nfrom_hf: weights")
    text = "model: ../model/tiny.yaml"
    config = load(tmp_path / "run", text, "--model.hidden_size", "512")
    assert (config.model.hidden_size, config.model.head_dim) == (512, 32)
    assert config.model.from_hf == str(tmp_path / "model/weights")
    by_word = load(tmp_path / "run", "model: {hidden_size: 64, n_groups: 4}", "--model", str(tiny))
    assert (by_word.model.hidden_size, by_word.model.n_groups) == (128, 4)


def test_paths_resolve_from_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = """
        run_dir: ../runs/a
        resume: ../runs/b/checkpoints/step_00000010
        model: {from_hf: weights}
        data: {blend: {../data/x: 1, /abs/y: 2}, phases: {1e12: {../data/z: 3}}}
    """
    config = load(tmp_path / "configs", text)
    assert config.data.phases == {1e12: {str(tmp_path / "data/z"): 3.0}}
    assert config.run_dir == str(tmp_path / "runs/a")
    assert config.resume == str(tmp_path / "runs/b/checkpoints/step_00000010")
    assert config.model.from_hf == str(tmp_path / "configs/weights")
    assert config.data.blend == {str(tmp_path / "data/x"): 1.0, "/abs/y": 2.0}
    config = load(tmp_path / "configs", text, "--run_dir", "r", "--data.path", "d",
                  "--data.blend", "{b: 1}", "--resume", "c")  # fmt: skip
    assert config.run_dir == str(tmp_path / "here/r")
    assert config.data.path == str(tmp_path / "here/d")
    corpus = load(tmp_path / "configs", "data: {default_corpus: ../data/z}").data.default_corpus
    assert corpus == str(tmp_path / "data/z")
    assert config.data.blend == {str(tmp_path / "here/b"): 1.0}
    assert config.resume == str(tmp_path / "here/c")


@pytest.mark.parametrize("word", ["auto", "never"])
def test_resume_words_are_not_paths(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, f"resume: {word}").resume == word


def test_blend_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {blend: {/a: 1, /b: 2}}")
    (tmp_path / "b.yaml").write_text("data: {blend: {/c: 3}}")
    assert load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"]).data.blend == {"/c": 3.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("+2e+1", 20.0),
        ("1", 1.0),
        (".5", 0.5),
        ("1.5e-7", 1.5e-7),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"train: {{lr: {text}}}").train.lr == value
    assert load(tmp_path, "", f"--train.lr={text}").train.lr == value


@pytest.mark.parametrize("pattern", ["*E", "M-*E", "-M", "E"])
def test_patterns_with_special_characters(tmp_path: Path, pattern: str) -> None:
    assert load(tmp_path, f'model: {{pattern: "{pattern}"}}').model.pattern == pattern
    assert load(tmp_path, "", f"--model.pattern={pattern}").model.pattern == pattern


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    assert load(tmp_path, "run_dir: 2030-01-02").run_dir == str(tmp_path / "2030-01-02")


def test_null_and_bare_switch(tmp_path: Path) -> None:
    assert load(tmp_path, "model: {moe_latent_size: null}").model.moe_latent_size is None
    assert load(tmp_path, "", "--model.moe_latent_size", "null").model.moe_latent_size is None
    config = load(tmp_path, "", "--train.deterministic")
    assert config.train.deterministic
    assert not load(tmp_path, "", "--train.deterministic", "false").train.deterministic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {max_step: 3}", "unknown key train.max_step; did you mean train.max_steps?"),
        ("model: {hidden_sise: 3}", "did you mean model.hidden_size?"),
        ("lr: 3", "unknown key lr; did you mean train.lr?"),
        ("trian: {lr: 3}", "unknown key trian; did you mean"),
        ("train: {hidden_size: 3}", "did you mean model.hidden_size?"),
        ("zzz: 3", "unknown key zzz"),
        ("train: {max_steps: many}", "train.max_steps: expected an integer, got many"),
        ("train: {max_steps: 1.5}", "train.max_steps: expected an integer, got 1.5"),
        ("train: {max_steps: '5'}", "train.max_steps: expected an integer, got the text '5'"),
        ("train: {lr: null}", "train.lr: expected a number, got null"),
        ("train: {lr: .nan}", "train.lr must be a finite number"),
        ("train: {schedule: linear}", "expected one of wsd, cosine, constant, got linear"),
        ("train: {deterministic: 3}", "train.deterministic: expected true or false"),
        ("model: {pattern: 3}", "model.pattern: expected text (quote it), got 3"),
        ("model: {moe_latent_size: a}", "model.moe_latent_size: expected an integer or null"),
        ("data: {blend: {a: b}}", "data.blend: expected a mapping of paths to numbers"),
        ("data: {blend: 3}", "data.blend: expected a mapping of paths to numbers"),
        ("precision: {formats: {a: 3}}", "precision.formats: expected a mapping of globs to f"),
        ("model: {mtp_pattern: *E}", 'put text that starts with * in quotes: "*E"'),
        ("model: [1]", "model must be a mapping of keys or the path of a YAML file"),
        ("model: gone.yaml", "gone.yaml: No such file"),
        ("train: {lr: 1, lr: 2}", "the key 'lr' is given twice"),
        ("- a", "expected `key: value` lines"),
        ("train:\n\tlr: 3", "run.yaml line 2: not valid YAML"),
        ("train: [", "not valid YAML"),
        ("train: {steps: 1" + "0" * 5000 + "}", "not valid YAML: ValueError"),
        ("train: {steps: !!int ''}", "not valid YAML: IndexError"),
        ("[" * 9999, "not valid YAML: RecursionError"),
        ("? [1]\n: 2", "a key must be plain text"),
        ("train: {lr: !!python/object/apply:os.getcwd []}", "not valid YAML"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, expected: str) -> None:
    said = message(tmp_path, text)
    assert expected in said
    assert "run.yaml" in said or "gone.yaml" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.max_step", "3"], "unknown option --train.max_step; did you mean --train.max_s"),
        (["--lr=3"], "unknown option --lr; did you mean --train.lr?"),
        (["--train.max_steps", "x"], "train.max_steps: expected an integer, got x"),
        (["--train.max_steps"], "--train.max_steps needs a value"),
        (["--model.pattern", "-M"], "write --model.pattern=VALUE when the value starts with a das"),
        (["--model", "gone.yaml"], "gone.yaml: No such file"),
        (["--train.lr", "nan"], "train.lr"),
        (["extra"], "unexpected words on the command line: extra"),
        (["--data.blend", "{a: b}"], "data.blend: expected a mapping of paths to numbers"),
    ],
)
def test_bad_words(tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in message(tmp_path, "", *words)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_config([tmp_path / "none.yaml"])
    with pytest.raises(UserError, match="directory"):
        load_config([tmp_path])
    (tmp_path / "latin.yaml").write_bytes("run_dir: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        load_config([tmp_path / "latin.yaml"])


def test_dump_names_every_key(tmp_path: Path) -> None:
    dumped = dump_config(RunConfig())
    for key in key_types():
        assert f"{key.rsplit('.', 1)[-1]}:" in dumped


def test_dump_reloads_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "", "--train.lr", "0.1", "--data.blend", "{a: 0.3, b c: 1}")
    config.train.eps, config.model.moe_latent_size = 0.1 + 0.2, None
    reloaded = load(tmp_path, dump_config(config))
    assert reloaded == config
    assert load(tmp_path, dump_config(reloaded)) == config


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.sampled_from(
    [
        "1e-3",
        "null",
        "2030-01-02",
        "*E",
        "yes",
        "a: b",
        "# c",
        "08",
        "",
        "\x85",
        "a\u2028b",
        "\u2029",
    ]
)
anything = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(lr=finite, seed=st.integers(), text=texts | anything, weights=st.lists(finite, max_size=3))
def test_dumped_values_are_exact(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float, seed: int, text: str, weights: list[float],
) -> None:  # fmt: skip
    """Compared as they are read, before types are checked."""
    config = RunConfig(run_dir="/runs/a")
    config.train.lr, config.train.seed, config.model.pattern = lr, seed, text
    config.data.blend = {f"/{i}": w for i, w in enumerate(weights)}
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8", newline="")
    assert read_keys(file) == flatten(asdict(config))


def test_null_is_said_not_left_out() -> None:
    """Nothing behind an option is a slip, and no way to write null."""
    for text in ("null", "~"):
        assert load_config([], ["--data.path", text]).data.path is None
        assert load_config([], [f"--model.moe_latent_size={text}"]).model.moe_latent_size is None
    with pytest.raises(UserError, match=r"model\.moe_latent_size.*got nothing"):
        load_config([], ["--model.moe_latent_size="])
