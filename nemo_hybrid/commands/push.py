"""`push`: a model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nemo_hybrid import __version__
from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import CHECKED, CommandOptions, refuse
from nemo_hybrid.errors import UserError


@dataclass(config=CHECKED)
class PushOptions(CommandOptions):
    """Send a model to the Hugging Face hub."""

    from_: str
    """Run (the model of fine-tuning, or the latest checkpoint), checkpoint, export or any Hugging
    Face directory. The state of training stays here."""
    repo: str
    """ORGANISATION/NAME or NAME; made if it is not there."""
    private: bool = True
    """Whether a repository that is made can be seen by its owners alone."""
    revision: str | None = None
    """Branch that gets the files; null: main."""
    message: str = "Upload model"
    """Of the commit."""


def push_command(options: PushOptions) -> None:
    """Check the files against their manifest, send them in one commit, and print where they are."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    from nemo_hybrid.checkpoint.publish import CARD

    # Of the HTTP library that the hub's takes, which is another in each of its versions.
    NoConnection: tuple[Any, ...] = HfHubHTTPError.__bases__
    directory = _model_of(options.from_)
    files = files_of(directory)
    operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=p) for n, p in files.items()]
    if CARD not in files:
        card = _card(directory).encode()
        operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card))
    size = sum(path.stat().st_size for path in files.values())
    print(
        f"{directory}: {len(operations)} files, {size / 1e9:.3g} GB, to {options.repo}", flush=True
    )
    api = HfApi(library_name="nemo_hybrid", library_version=__version__)
    try:
        made = api.create_repo(options.repo, private=options.private, exist_ok=True)
        if options.revision is not None:
            api.create_branch(made.repo_id, branch=options.revision, exist_ok=True)
        done = api.create_commit(
            made.repo_id, operations, commit_message=options.message, revision=options.revision
        )
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to send something to the hub") from None
    except HFValidationError as error:
        raise UserError(f"--repo {options.repo}: {error}") from None
    except LocalTokenNotFoundError:
        raise UserError(
            "no token of the hub is known: run `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        why = error.server_message or str(error).splitlines()[0]
        raise UserError(f"{api.endpoint} refuses {options.repo}: {why}") from None
    except NoConnection as error:
        raise UserError(f"{api.endpoint} cannot be reached: {error}; no commit was made") from None
    print(done.commit_url)


def _model_of(path: str) -> Path:
    from nemo_hybrid.checkpoint.steps import resolve
    from nemo_hybrid.train.run_dir import MODEL

    published = Path(path).expanduser() / MODEL
    return published if (published / "config.json").is_file() else resolve(path)


def files_of(directory: Path) -> dict[str, Path]:
    """Files of a model by their names in the repository: those that its manifest lists, of which
    every checksum is compared, or without one all that are there, but for the state of training.

    Raises UserError where there is no model, and CheckpointError for a damaged file.
    """
    from nemo_hybrid.checkpoint.directory import verify
    from nemo_hybrid.checkpoint.manifest import MANIFEST
    from nemo_hybrid.checkpoint.names import is_training_state

    refuse((not (directory / "config.json").is_file(), f"{directory} holds no config.json"))
    if (directory / MANIFEST).is_file():
        names = sorted(verify(directory))
    else:
        found = (p for p in directory.rglob("*") if p.is_file())
        relative = (p.relative_to(directory) for p in found)
        names = sorted(str(p) for p in relative if not any(q.startswith(".") for q in p.parts))
    return {name: directory / name for name in names if not is_training_state(name)}


def _card(directory: Path) -> str:
    """Of a model that has none: a checkpoint of pre-training."""
    from nemo_hybrid.checkpoint.publish import code, origin_name, short_card
    from nemo_hybrid.config.hf import read_config

    shape, name = read_config(directory), code(origin_name(directory))
    told = f"Trained with nemo_hybrid {__version__}: layers {code(shape.pattern)}, hidden "
    told += f"{shape.hidden_size}."
    return short_card(["pre-trained"], directory, name, told, shape, directory)


COMMANDS = {"push": Command(push_command, PushOptions, reads="from_")}
