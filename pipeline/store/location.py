"""Where a store lies: a folder, or a prefix of a bucket; and the few operations that both kinds of place have."""

from __future__ import annotations

import errno
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pipeline.store.errors import StoreError, is_object_store_error, reason_of, storage_error

SCHEMES = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
PARTIAL = ".partial"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Location(ABC):
    """A place for a store: keys with bytes below it, as Zarr sees it or one by one.

    ``str()`` names it as the user did, and never holds a credential.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of it, empty if it has none of its own."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Text that names the same place from any working directory and any node."""

    @property
    @abstractmethod
    def report_folder(self) -> Path:
        """Local folder for what is drawn from the store."""

    @abstractmethod
    def zarr(self, *, read_only: bool = False) -> Any:
        """Return a Zarr store over it."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the bytes of a key, None if there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a key, whole or not at all, over what was there."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a key that does not exist; return False if it does. Of several at once exactly one gets True."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a key; one that does not exist is no error."""

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys in a folder and below, in no order; unfinished files of killed writers are none."""

    @abstractmethod
    def sweep_partial(self) -> int:
        """Delete unfinished files that killed writers left behind; returns how many."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys in a folder and below, sorted."""
        return sorted(self.keys(prefix))

    def exists(self, key: str) -> bool:
        """Return whether a key exists."""
        return self.read(key) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)


Place: TypeAlias = Location | str | Path
"""Whatever names a store."""


def locate(place: Place) -> Location:
    """Return the location that a text or path names; a location is returned as it is.

    Raises
    ------
    StoreError : a URL that is of no known kind, incomplete, or holds a user, a password or parameters.
    """
    if isinstance(place, Location):
        return place
    text = str(place)
    if "://" in text:
        return _bucket(text)
    if re.match(r"^(s3|gs):/(?!/)", text):
        raise StoreError(f"{text} is not a URL of a store: it has one slash. Write {text.replace(':/', '://', 1)}.")
    return Folder(Path(text))


def _bucket(text: str) -> Bucket:
    scheme, _, rest = text.partition("://")
    if "@" in rest.split("/", 1)[0]:
        hidden = f"{scheme}://***@{rest.split('@', 1)[1]}"
        names = SCHEMES.get(scheme, "the environment's variables")
        raise StoreError(f"a store's URL must hold no user or password: {hidden}. Set {names} instead.")
    if scheme not in SCHEMES:
        raise StoreError(
            f"unknown kind of store: {scheme}://. Give a folder, s3://BUCKET/NAME.zarr or gs://BUCKET/NAME.zarr."
        )
    parts = urlsplit(text)
    if parts.query or parts.fragment:
        # Signed URLs carry their secret there.
        raise StoreError(
            f"a store's URL must hold no parameters: {scheme}://{parts.netloc}{parts.path}?***. Drop them."
        )
    names_ = parts.path.strip("/").split("/")
    if not parts.netloc or any(part in ("", ".", "..") for part in names_):
        raise StoreError(f"{text} does not name a store in a bucket. Write {scheme}://BUCKET/NAME.zarr.")
    return Bucket(f"{scheme}://{parts.netloc}/{'/'.join(names_)}")


class Folder(Location):
    """A folder of a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    @property
    def name(self) -> str:
        return "" if self.path.name == ".." else self.path.name

    @property
    def address(self) -> str:
        return os.path.abspath(self.path)

    @property
    def report_folder(self) -> Path:
        return self.path.with_name(self.path.stem + "_report")

    def zarr(self, *, read_only: bool = False) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        self._place(key, data, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._place(key, data, _link)
        except _TakenError:
            return False
        return True

    def _place(self, key: str, data: bytes, place: Any) -> None:
        target = self.path / key
        for attempt in range(3):
            unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(data)
                place(unfinished, target)
                return
            except FileNotFoundError:
                # A new driver sweeps unfinished files, and cannot tell those of a living process.
                if attempt == 2:
                    raise
            except OSError as error:
                raise storage_error(error, f"{key} of store {self}") or error from error
            finally:
                unfinished.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def keys(self, prefix: str = "") -> Iterator[str]:
        for folder, _, files in os.walk(self.path / prefix, onerror=_unlisted):
            for file in files:
                if not file.endswith(PARTIAL):
                    yield Path(folder, file).relative_to(self.path).as_posix()

    def exists(self, key: str) -> bool:
        return os.path.exists(self.path / key)

    def sweep_partial(self) -> int:
        leftovers = list(self.path.rglob(f"*{PARTIAL}"))
        for file in leftovers:
            file.unlink(missing_ok=True)
        return len(leftovers)


def _unlisted(error: OSError) -> None:
    """Let nobody take a folder that does not answer for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class _TakenError(Exception):
    """A key that was to be created exists."""


def _link(unfinished: Path, target: Path) -> None:
    """Give a complete file a name that must be free."""
    try:
        try:
            os.link(unfinished, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # File systems without hard links: the name is taken first, the content follows.
            with target.open("xb") as handle:
                handle.write(unfinished.read_bytes())
    except FileExistsError as error:
        raise _TakenError from error


class Bucket(Location):
    """A prefix of a bucket of S3 or Google Cloud Storage; credentials come from the environment."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.url,)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def address(self) -> str:
        return self.url

    @property
    def report_folder(self) -> Path:
        return Path(Path(self.name).stem + "_report")

    @cached_property
    def objects(self) -> Any:
        """The obstore store."""
        try:
            from obstore.store import GCSStore, S3Store
        except ImportError as error:
            raise StoreError(f"store {self} needs the package obstore. Install it: pip install obstore.") from error
        with self._reaching():
            if self.url.startswith("gs://"):
                return GCSStore.from_url(self.url)
            endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
            # Plain HTTP only where the user asked for it: servers on the own machine or network.
            return S3Store.from_url(self.url, client_options={"allow_http": endpoint.startswith("http://")})

    def zarr(self, *, read_only: bool = False) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self.objects, read_only=read_only)

    def read(self, key: str) -> bytes | None:
        import obstore

        with self._reaching():
            try:
                return bytes(obstore.get(self.objects, key).bytes())
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        import obstore

        with self._reaching(key):
            obstore.put(self.objects, key, data)

    def create(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._reaching(key):
            try:
                obstore.put(self.objects, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def delete(self, key: str) -> None:
        import obstore

        with self._reaching(key):
            try:
                obstore.delete(self.objects, key)
            except FileNotFoundError:
                return

    def keys(self, prefix: str = "") -> Iterator[str]:
        import obstore

        with self._reaching():
            for batch in obstore.list(self.objects, prefix or None):
                for item in batch:
                    yield item["path"]

    def exists(self, key: str) -> bool:
        import obstore

        with self._reaching():
            try:
                obstore.head(self.objects, key)
            except FileNotFoundError:
                return False
        return True

    def sweep_partial(self) -> int:
        return 0

    @contextmanager
    def _reaching(self, written: str = "") -> Iterator[None]:
        """Turn errors of the object store into sentences; a key is named where it was to be written."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
                bucket = self.url.split("/")[2]
                raise StoreError(
                    f"store {self} cannot be reached: there is no bucket {bucket}. Create it first."
                ) from error
            if not is_object_store_error(error):
                raise
            refused = storage_error(error, f"{written} of store {self}") if written else None
            if refused is not None and type(refused) is not StoreError:
                raise refused from error
            needed = SCHEMES[self.url.split(":")[0]]
            raise StoreError(
                f"store {self} cannot be reached: {reason_of(error)}. Check its name, the network and {needed}."
            ) from error
