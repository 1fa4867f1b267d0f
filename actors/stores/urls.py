"""URLs of object stores: what is one, and which fsspec filesystem reads and writes it."""

from typing import Any

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_url(place: str) -> bool:
    """Whether a place is in an object store: anything with a scheme other than file://."""
    return "://" in place and not place.startswith("file://")


def filesystem_of(url: str) -> Any:
    """The fsspec filesystem for a URL. Raises ValueError where its package is not installed, or no scheme is known."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package} (or the extra stores)" if package else "install what fsspec needs for it"
        raise ValueError(f"{url}: {error}; {remedy}, on every machine that opens it") from None
    except ValueError as error:
        raise ValueError(f"{url}: {error}; use a path, or a URL that fsspec knows, such as s3://bucket/key") from None
