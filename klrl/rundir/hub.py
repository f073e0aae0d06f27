"""Runs on the Hugging Face Hub, called hf:user/name or hf:user/name@revision. Needs the extra ``hub``."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klrl.errors import UsageError, needs, one_line

PREFIX = "hf:"
_FILES = ("manifest.json", "state.json", "tensors.safetensors")  # of a checkpoint; nothing else is downloaded


@contextmanager
def downloaded(name: str) -> Iterator[Path]:
    """A folder, as long as the block takes, with the checkpoints of the repository that is called so.

    The Hub's own cache keeps them, as links to files elsewhere, which a checkpoint must not hold. Raises UsageError
    where there is no such repository or revision, or none that can be read.
    """
    with needs("hub", "huggingface_hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with no_progress_bars():
            kept = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=[f"*{f}" for f in _FILES])
            )
    except RepositoryNotFoundError:
        raise UsageError(f"{name}: no such repository on the Hugging Face Hub, or a private one of others") from None
    except RevisionNotFoundError:
        raise UsageError(f"{name}: that repository has no revision {revision}") from None
    except Exception as problem:  # the client's others, and those of the HTTP library that it has at present
        raise UsageError(f"{name} cannot be downloaded: {one_line(problem)}") from None
    with tempfile.TemporaryDirectory() as folder:
        for file in kept.rglob("*"):
            if file.name in _FILES:
                copy = Path(folder) / file.relative_to(kept)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        try:
            yield Path(folder)
        except UsageError as problem:
            raise UsageError(str(problem).replace(folder, name)) from None


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the Hub's client from drawing bars for files of a few kilobytes."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
