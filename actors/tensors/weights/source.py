"""Finds the folder of a checkpoint: a local one, a hub id's snapshot in the local cache, a node's copy of a URL's."""

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from actors.stores.mirror import WEIGHTS, copies_of, is_chosen, mirror_of, open_mirror
from actors.stores.urls import is_url
from configs.config import ModelConfig
from configs.files import PROJECT_ROOT

# Serving reads weights, configs and tokenizer files at the top of the repository. The same weights in their original
# format (consolidated*.safetensors) would double the download.
_WANTED = [WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*", ".*"]


def resolve_source(model: ModelConfig, revision: str | None = None) -> Path:
    """The folder that `model.source` names; of a hub id or URL what this node lacks is downloaded.

    A hub id's files are downloaded whole, unless HF_HUB_OFFLINE is set. Of a URL's weights the headers are; their bytes
    are fetched when they are read (`weights.mapped`). `revision`: what was found before, to find the same again.

    A folder wins over a hub id of the same spelling; relative folders start at the project's root. Raises ValueError
    that names model.source and the remedy.
    """
    if (folder := local_folder(model.source, model.revision)) is not None:
        return folder
    find = _copy if is_url(model.source) else _snapshot
    return _check_contents(model.source, find(model, revision or model.revision))


def revision_of(folder: Path) -> str | None:
    """The commit of a snapshot from the hub, the version of a copy of a URL; None for a folder."""
    return folder.name if folder.parent.name == "snapshots" or mirror_of(folder) is not None else None


def is_read(name: str) -> bool:
    """Whether a file of a repository, by its path there, is one of the weights that a download brings."""
    return is_chosen(name, [WEIGHTS], _UNWANTED)


def local_folder(source: str, revision: str | None = None) -> Path | None:
    """The folder on this machine that a source names, else None. Raises ValueError like `resolve_source`."""
    if is_url(source):
        return None
    folder = (PROJECT_ROOT / Path(source).expanduser()).resolve()
    if folder.is_dir():
        if (mirror := mirror_of(folder)) is not None:  # it may have come from anywhere, and would be fetched into
            raise ValueError(
                f"model.source: {folder} is a copy of which parts may be missing; name its URL, {mirror.url}, and "
                "model.cache_folder for where copies are"
            )
        if revision is not None:
            raise ValueError(
                f"model.revision: {revision!r} is for hub ids, but model.source {source!r} is the folder {folder}; "
                "leave model.revision out"
            )
        return _check_contents(source, folder)
    if folder.exists():
        raise ValueError(f"model.source: {folder} is a file; name the folder that holds config.json")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ValueError(
            f"model.source: there is no folder {folder}; name one that exists, a hub id like org/name, or a URL like "
            "s3://bucket/prefix"
        )
    return None


def architecture_folder(model: ModelConfig) -> tuple[Path, bool]:
    """A folder with the model's config.json, and whether it is one of the public configs shipped with us.

    Enough for a plan: weights need not be there. Nothing is downloaded, but of a URL all that is no weight. Raises
    ValueError like `resolve_source`.
    """
    source, revision = model.source, model.revision
    if is_url(source):
        return resolve_source(model), False
    folder = (PROJECT_ROOT / Path(source).expanduser()).resolve()
    if (folder / "config.json").is_file():
        return folder, False
    if folder.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ValueError(
            f"model.source: {folder} holds no config.json; name a folder that does, or a hub id like org/name"
        )
    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent, False
    shipped = PROJECT_ROOT / "configs" / "architectures" / source.replace("/", "--")
    if (shipped / "config.json").is_file():
        return shipped, True
    raise ValueError(
        f"model.source: {source} is neither a folder with a config.json, nor in the local cache, nor among the "
        f"architectures that are shipped ({', '.join(shipped_architectures())}); download its config.json into a "
        "folder, and name that"
    )


def cache_folder(source: str, revision: str | None = None, copies: str | None = None) -> Path:
    """Where this node has a hub id or the copies of a URL, or would put them. `copies`: model.cache_folder."""
    if is_url(source):
        return copies_of(source, _copies(copies))
    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")


def shipped_architectures() -> list[str]:
    """Hub ids whose configs are shipped, so that they can be planned for offline."""
    folders = sorted((PROJECT_ROOT / "configs" / "architectures").iterdir())
    return [folder.name.replace("--", "/") for folder in folders]


def _copy(model: ModelConfig, revision: str | None) -> Path:
    return open_mirror(model.source, revision, _copies(model.cache_folder), _WANTED, _UNWANTED).folder


def _copies(asked: str | None) -> Path:
    return PROJECT_ROOT / Path(asked or Path(HF_HOME) / "stagemesh").expanduser()


def _snapshot(model: ModelConfig, revision: str | None) -> Path:
    source = model.source
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        wanted = source if revision is None else f"{source} at model.revision {revision!r}"
        raise ValueError(
            f"model.source: {wanted} is no folder under {PROJECT_ROOT}, and neither the hub nor the local cache has it "
            f"({reason})"
        ) from error


def _check_contents(source: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.source: {source!r}: {folder} holds no config.json; name a Transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.source: {source!r}: {folder} holds no *.safetensors; only safetensors are read, "
            "convert other formats first with save_pretrained"
        )
    return folder
