"""Opening a store: ours and of this very config, or created whole; anything else is refused with the reason."""

from __future__ import annotations

import glob
import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.plan import Plan
from pipeline.store.errors import StoreError, is_object_store_error, reason_of
from pipeline.store.location import Bucket, Folder, Location, Place, locate
from pipeline.store.regions import Store
from pipeline.store.restore import restore_template
from pipeline.store.template import SCHEMA_VERSION, template_of, write_template

ROOT = "zarr.json"
CREATING = "creating.json"
"""Marks a prefix of a bucket in which a store is being created, and for which config."""
_UPLOADS = 8


def is_store(place: Place) -> bool:
    """Return whether a place holds a store of ours.

    Raises
    ------
    StoreError : a bucket cannot be reached.
    """
    try:
        attrs = json.loads(locate(place).read(ROOT) or b"")["attributes"]
    except (OSError, LookupError, TypeError, RecursionError):
        return False
    except StoreError:
        raise
    except ValueError:
        return False
    return isinstance(attrs, dict) and {"config_sha256", "schema_version"} <= attrs.keys()


def open_store(place: Place) -> Store:
    """Open an existing store.

    Raises
    ------
    StoreError : the place is not a store, cannot be reached, or was written by a newer schema.
    """
    location = locate(place)
    if not is_store(location):
        if _lost_its_root(location):
            raise _damaged(location)
        what = "does not exist" if _is_absent(location) else "is not a stepscope store"
        raise StoreError(f"{location} {what}. Create one with: stepscope run CONFIG --store {location}")
    try:
        store = Store(location)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(f"store {location} cannot be opened for writing: {reason_of(error)}") from error
    found = _schema(store)
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"store {location} has schema version {found}, this stepscope reads up to {SCHEMA_VERSION}. Update it."
        )
    return store


def open_or_create(place: Place, plan: Plan, *, say: Callable[[str], None] | None = None) -> Store:
    """Open the store of this very config, or create it whole: every array allocated, every unit pending.

    Of a store that is there, damaged parts of the template are written anew.

    Parameters
    ----------
    say : told which parts those are.

    Raises
    ------
    StoreError : the place holds something else, or another config (with the differing keys), or is not writable.
    """
    location = locate(place)
    if is_store(location):
        return _open_same(location, plan, say)
    if _lost_its_root(location):
        raise _damaged(location)
    if not location.name:
        raise StoreError(f"{location} has no name of its own. Name a new folder with --store.")
    if isinstance(location, Folder):
        created = _create_folder(location.path, plan)
    else:
        assert isinstance(location, Bucket)
        created = _create_in_bucket(location, plan)
    # Where another first start was faster, what it made is this store, or is refused like any other.
    return Store(location) if created else _open_same(location, plan, say)


def _open_same(location: Location, plan: Plan, say: Callable[[str], None] | None) -> Store:
    store = open_store(location)
    attrs, found = dict(store.root.attrs), _schema(store)
    if found != SCHEMA_VERSION:
        # Older ones order the axes of an experiment otherwise.
        raise StoreError(
            f"store {location} was begun with schema version {found}, this stepscope writes {SCHEMA_VERSION}. "
            "Finish it with the version that began it, or use another --store."
        )
    if store.config_hash != plan.config.hash():
        keys = "; ".join(differing(_stored_config(attrs, location), plan.config.identity()))
        if not keys:
            raise _damaged(location)
        raise StoreError(
            f"store {location} holds another config. Differing: {keys}. Use another --store, or that config."
        )
    if _stored_config(attrs, location) != plan.config.identity() or "model_digest" not in attrs:
        raise _damaged(location)
    if attrs["model_digest"] != plan.model.digest:
        raise StoreError(
            f"store {location} was computed with other weights or settings of {plan.model.id}. Use another --store."
        )
    restored = restore_template(location, plan)
    if restored and say is not None:
        say(f"store {location}: damaged parts of the template were written anew: {', '.join(restored)}.")
    return Store(location) if restored else store


def _schema(store: Store) -> int:
    try:
        return int(str(store.root.attrs["schema_version"]))
    except ValueError as error:
        raise _damaged(store.location) from error


def _stored_config(attrs: dict[str, Any], location: Location) -> Any:
    try:
        return json.loads(str(attrs["config_json"]))
    except (ValueError, LookupError, RecursionError) as error:
        raise _damaged(location) from error


def _damaged(location: Location) -> StoreError:
    return StoreError(
        f"store {location} is damaged: its {ROOT} does not say what it was created for. "
        "Put back a copy of that file, or use another --store."
    )


def differing(a: Any, b: Any, prefix: str = "") -> list[str]:
    """List the key paths in which two configs differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in sorted({*a, *b})
            for line in differing(a.get(key), b.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if a == b else [f"{prefix} is {json.dumps(a)} in the store, {json.dumps(b)} in the config"]


def _lost_its_root(location: Location) -> bool:
    """Whether the groups of a store are there, so that only its root is missing or damaged."""
    if not all(location.exists(f"{group}/{ROOT}") for group in ("samples", "baseline")):
        return False
    # In this order: a store that is being created at this moment has the mark, and then the root.
    return not location.exists(CREATING) and not is_store(location)


def _is_absent(location: Location) -> bool:
    if isinstance(location, Folder):
        return not os.path.exists(location.path)
    return next(location.keys(), None) is None


def _create_folder(path: Path, plan: Plan) -> bool:
    """Create a store beside its place and move it there; return False if another first start was faster."""
    from zarr.storage import LocalStore

    # Of this process alone: two first starts at once, on machines that share the folder, must not build in one place.
    machine = platform.node().replace(".", "-")
    building = path.with_name(f"{path.name}.{machine}.{os.getpid()}.building")
    try:
        # os.path.exists is False where pathlib raises, as below a folder that may not be read.
        if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
            if is_store(path):
                return False
            raise StoreError(f"{path} exists and is not a stepscope store. Use another --store.")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only here is it known that a process has ended.
        for rest in path.parent.glob(f"{glob.escape(path.name)}.{glob.escape(machine)}.*.building"):
            if not _is_alive(rest.name.split(".")[-2]):
                _remove(rest)
        try:
            write_template(LocalStore(building), plan)
            try:
                if path.exists():
                    path.rmdir()
                building.rename(path)
            except OSError:
                if not is_store(path):
                    raise
                _remove(building)
                return False
        except BaseException:
            _remove(building)
            raise
    except OSError as error:
        raise StoreError(
            f"cannot create store {path}: {error.strerror or error}. Choose a writable --store."
        ) from error
    return True


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def _create_in_bucket(location: Bucket, plan: Plan) -> bool:
    """Create a store in a bucket, its root last; return False if another first start was faster.

    A bucket cannot rename. What is there without a root is no store, and this config's next start completes it.
    """
    _claim_prefix(location, plan)
    if is_store(location):
        # Another first start finished between the look at the root and the claim.
        location.delete(CREATING)
        return False
    template = template_of(plan)
    root = template.pop(ROOT)
    try:
        with ThreadPoolExecutor(_UPLOADS) as pool:
            # Never over what is there: a faster first start may already be writing units and status.
            list(pool.map(lambda item: location.create(*item), template.items()))
        created = location.create(ROOT, root)
    except Exception as error:
        if isinstance(error, StoreError) or not is_object_store_error(error):
            raise
        raise StoreError(f"cannot create store {location}: {reason_of(error)}. Choose a writable --store.") from error
    location.delete(CREATING)
    return created


def _claim_prefix(location: Bucket, plan: Plan) -> None:
    """Mark the prefix as this config's, unless it holds something else.

    Raises
    ------
    StoreError : it does, be it the beginnings of a store of another config.
    """
    mine = json.dumps({"config_sha256": plan.config.hash(), "model_digest": plan.model.digest}).encode()
    marked = location.read(CREATING)
    if marked is None and next(location.keys(), None) is not None:
        # Looked at again, in this order: another first start puts its mark, then the root, and then takes the mark.
        marked = location.read(CREATING)
        if marked is None and not is_store(location):
            raise StoreError(f"{location} exists and is not a stepscope store. Use another --store.")
    if marked is None:
        if location.create(CREATING, mine):
            return
        marked = location.read(CREATING)
    if marked is not None and marked != mine:
        raise StoreError(
            f"{location} holds the beginnings of a store of another config. "
            "Use another --store, or delete what is there."
        )
