"""YAML files of options: sections in files of their own, paths seen from the file that names them,
and a configuration back to YAML.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from nemo_hybrid.config.base import GLOBS, OptionError, Options, field_types
from nemo_hybrid.config.run import IN_STEPS, RunConfig, TrainingConfig
from nemo_hybrid.config.words import Pairs, split_words, value_of
from nemo_hybrid.errors import UserError, suggest

Config = TypeVar("Config", bound=TrainingConfig)

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
"""What lies in run_dir: the resolved configuration of the last start, and a directory."""
PATH_KEYS = (
    "run_dir",
    "resume",
    "continue_from",
    "model.from_hf",
    "data.path",
    "data.short.path",
    "data.default_corpus",
    "data.heldout_path",
    "data.chat_template",
)
"""Keys that hold a path. The keys inside blends and data.phases are paths too."""
BLENDS = ("data.blend", "data.short.blend")
NOT_A_PATH = {"resume": ("auto", "never")}


def sections(kind: type[Options] = RunConfig) -> dict[str, type[Options]]:
    """Name and class of every section of a kind of run, in order; ``data.short`` lies in
    ``data``."""
    found: dict[str, type[Options]] = {}
    for name, hint in field_types(kind).items():
        if is_dataclass(hint):
            inside = sections(hint).items()  # type: ignore[arg-type]
            found |= {name: hint, **{f"{name}.{inner}": section for inner, section in inside}}  # type: ignore[dict-item]
    return found


def key_types(kind: type[TrainingConfig] = RunConfig) -> dict[str, Any]:
    """Type of every dotted key of a kind of run, such as ``train.lr``."""
    inner = sections(kind)
    found = field_types(kind) | {
        f"{section}.{name}": hint
        for section, options in inner.items()
        for name, hint in field_types(options).items()
    }
    return {key: hint for key, hint in found.items() if key not in inner}


def load_config(
    files: Iterable[str | Path],
    overrides: Sequence[str] = (),
    kind: type[Config] = RunConfig,  # type: ignore[assignment]
) -> Config:
    """Merge YAML files in order, then apply ``--dotted.key value`` words.

    A word pair ``--SECTION FILE`` (for example ``--model model/tiny.yaml``) merges a section's file
    after all configuration files. The result has absolute paths; call ``validate()`` on it.
    Raises UserError for a missing or malformed file, an unknown key or a value of a wrong type.
    """
    return merge(files, split_words(overrides, run_options(kind)), kind)


def run_options(kind: type[TrainingConfig]) -> dict[str, Any]:
    """Type of every option of a kind of run: its sections' files, and its keys."""
    keys = {f"--{key}": hint for key, hint in key_types(kind).items()}
    return {f"--{name}": str for name in sections(kind)} | keys


def kind_of(
    files: Iterable[str | Path], options: Iterable[str], kinds: Sequence[type[TrainingConfig]]
) -> type[TrainingConfig]:
    """The kind of run that knows most of the keys in configuration files and options, such as
    ``--train.lr``; of equals the first. Raises UserError for a file that cannot be read."""
    keys = {option[2:] for option in options}
    for file in files:
        for key, value in _read_yaml(Path(file)).items():
            keys |= {f"{key}.{name}" for name in value} if isinstance(value, dict) else {str(key)}
    return min(kinds, key=lambda kind: len(keys - {*key_types(kind), *sections(kind)}))


def merge(files: Iterable[str | Path], pairs: Pairs, kind: type[Config]) -> Config:
    """What load_config does, of pairs of option and text; other options are left alone."""
    values: dict[str, Any] = {"run_dir": kind().run_dir}
    origin: dict[str, str | Path] = {}  # file that a key's value comes from
    read = [(file, read_keys(Path(file), kind)) for file in files]
    for name in sections(kind):
        given = [text for option, text in pairs if option == f"--{name}"]
        read += [(file, read_keys(Path(file), kind, name)) for file in given]
    for file, found in read:
        _replace(values, found, file)
        origin |= dict.fromkeys(found, file)
    types = key_types(kind)
    for option, text in pairs:
        key = option[2:]
        if key in types:
            _replace(values, {key: value_of(text, types[key])}, "")
            origin.pop(key, None)
    try:
        return build(_resolve_paths(values, Path.cwd()), kind).in_steps()
    except OptionError as error:
        where = f"{origin[error.key]}: " if error.key in origin else ""
        raise UserError(f"{where}{error}") from None


def _replace(values: dict[str, Any], found: dict[str, Any], file: str | Path) -> None:
    """Add what a file, or an option, gives: of steps and tokens the later one counts."""
    for tokens, steps in IN_STEPS.items():
        pair = {f"train.{tokens}", f"train.{steps}"}
        given = [key for key in pair if found.get(key) is not None]
        if len(given) == 2:
            raise UserError(f"{file}: give train.{tokens} or train.{steps}, not both")
        for other in pair.difference(given) if given else ():
            values.pop(other, None)
    values |= found


def read_keys(
    file: Path, kind: type[TrainingConfig] = RunConfig, section: str = ""
) -> dict[str, Any]:
    """The dotted keys of one configuration file, or of a file of one section, such as a model's
    shape: sections read in, keys checked, paths absolute."""
    return _in_section(_read_yaml(file), section, file, kind)


def _read_yaml(file: Path) -> dict[str, Any]:
    from nemo_hybrid.config.yaml_text import read_yaml  # most mistakes end before any file is read

    return read_yaml(file)


def _in_section(
    content: Any, section: str, file: Path, kind: type[TrainingConfig]
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: {section} must be a mapping of keys or the path of a YAML file, "
            f"got {content!r}"
        )
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if name not in sections(kind):
            flat |= _known({name: value}, file, kind)
        elif isinstance(value, str):
            flat |= read_keys(_resolve(value, file.parent), kind, name)
        else:
            flat |= _in_section({} if value is None else value, name, file, kind)
    return flat


def _known(flat: dict[str, Any], file: Path, kind: type[TrainingConfig]) -> dict[str, Any]:
    """The same keys, if there are such, with paths seen from the file, and mappings of globs that
    are kept in files of their own."""
    known = key_types(kind)
    for key, value in flat.items():
        if key not in known:
            near = suggest(key, [*sections(kind), *known])
            raise UserError(f"{file}: unknown key {key}{near}")
        if known[key] == GLOBS and isinstance(value, str):
            flat = {**flat, key: _read_yaml(_resolve(value, file.parent))}
    return _resolve_paths(flat, file.parent)


def flatten(content: dict[str, Any], kind: type[TrainingConfig] = RunConfig) -> dict[str, Any]:
    """Dotted keys of a configuration by sections; data.blend stays one value."""
    flat = dict(content)
    for section in sections(kind):  # the outer one first
        if isinstance(flat.get(section), dict):
            flat |= {f"{section}.{key}": value for key, value in flat.pop(section).items()}
    return flat


def _resolve(path: str, base: Path) -> Path:
    """Without ``..``; links are kept, so that they may be moved later."""
    return Path(os.path.normpath(base.absolute() / Path(path).expanduser()))


def _resolve_paths(flat: dict[str, Any], base: Path) -> dict[str, Any]:
    """The same with every relative path made absolute, seen from base."""
    out = dict(flat)
    for key in PATH_KEYS:
        value = flat.get(key)
        if isinstance(value, str) and value not in NOT_A_PATH.get(key, ()):
            out[key] = str(_resolve(value, base))

    if isinstance(flat.get("teachers"), dict):
        out["teachers"] = {n: str(_resolve(str(d), base)) for n, d in flat["teachers"].items()}

    def stores(blend: Any) -> Any:
        if not isinstance(blend, dict):
            return blend
        return {str(_resolve(str(store), base)): weight for store, weight in blend.items()}

    for blend in BLENDS:
        if blend in flat:
            out[blend] = stores(flat[blend])
    if isinstance(flat.get("data.phases"), dict):
        out["data.phases"] = {t: stores(blend) for t, blend in flat["data.phases"].items()}
    return out


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """A mapping of sections from dotted keys."""
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, name = key.split(".")
        place = content
        for section in outer:
            place = place.setdefault(section, {})
        place[name] = value
    return content


def build(flat: dict[str, Any], kind: type[Config]) -> Config:
    """A configuration from dotted keys. Raises OptionError."""
    return _built(nest(flat), kind)


def _built(content: dict[str, Any], options: type[Any]) -> Any:
    inner = {n: h for n, h in field_types(options).items() if is_dataclass(h)}
    made = {n: _built(content.get(n, {}), cast(Any, h)) for n, h in inner.items()}
    return options(**content | made)


def dump_config(config: TrainingConfig, in_run_dir: bool = False) -> str:
    """YAML text from which load_config gives an equal configuration (paths made absolute, but for
    that of run_dir in a file that lies ``in_run_dir``, so that both can move)."""
    from nemo_hybrid.config.yaml_text import dump_yaml

    kind = type(config)
    flat = _resolve_paths(flatten(asdict(config), kind), Path.cwd())
    return dump_yaml(nest(flat | ({"run_dir": "."} if in_run_dir else {})))


def check_home(files: Iterable[str | Path], run_dir: str) -> None:
    """Raise UserError where the last file that names a run_dir is that of a run (or of one of its
    checkpoints) in another directory: a run that was moved or copied since."""
    named = [Path(file).absolute() for file in files if "run_dir" in _read_yaml(Path(file))]
    if not named:
        return
    file = named[-1]
    in_checkpoint = file.parent.name.startswith("step_")
    home = file.parents[2] if in_checkpoint else file.parent
    if not in_checkpoint and file.name != CONFIG_FILE:
        return
    if any(home.glob(f"{CHECKPOINTS}/step_*")) and home.resolve() != Path(run_dir).resolve():
        raise UserError(
            f"{file} is of a run in {home}, but its run_dir is {run_dir}: was the run moved or "
            f"copied? Go on in its new place with --run_dir {home}, or name another directory"
        )
