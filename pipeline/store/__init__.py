"""The Zarr store of a sweep, in a folder or a bucket: template, regions, status, journal and the driver's lease."""

from pipeline.store.errors import LeaseLostError as LeaseLostError
from pipeline.store.errors import StorageFullError as StorageFullError
from pipeline.store.errors import StorageReadOnlyError as StorageReadOnlyError
from pipeline.store.errors import StoreError as StoreError
from pipeline.store.journal import DONE as DONE
from pipeline.store.journal import FAILED as FAILED
from pipeline.store.journal import PENDING as PENDING
from pipeline.store.journal import Journal as Journal
from pipeline.store.journal import status_of as status_of
from pipeline.store.lease import Lease as Lease
from pipeline.store.lease import request_stop as request_stop
from pipeline.store.lease import stop_requested as stop_requested
from pipeline.store.location import Location as Location
from pipeline.store.location import Place as Place
from pipeline.store.location import locate as locate
from pipeline.store.opening import differing as differing
from pipeline.store.opening import is_store as is_store
from pipeline.store.opening import open_or_create as open_or_create
from pipeline.store.opening import open_store as open_store
from pipeline.store.regions import Store as Store
from pipeline.store.template import CODEC as CODEC
from pipeline.store.template import PREVIEW_RUNS as PREVIEW_RUNS
from pipeline.store.template import SCHEMA_VERSION as SCHEMA_VERSION
from pipeline.store.template import consolidate as consolidate
