"""HDF5 files, looked through before Keras reads them.

Such a file may lead into other files, hold itself, or claim an array of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from isovit.errors import InputError
from isovit.weight_convert.files import check_inflated, reading
from isovit.weight_convert.tensors import Spec, check_number

DEEPEST = 64
"""Groups in groups; Keras makes one for each module in a module."""


def specs(path: Path) -> dict[str, Spec]:
    """Shape and dtype of every dataset.

    Raises:
        InputError: if it is no HDF5 file, leads into others, or claims far more than it holds.
    """
    h5py = import_module("h5py")  # comes with Keras; has no types
    found: dict[str, Spec] = {}
    with reading(path, "a Keras weights file"), h5py.File(path, "r") as file:
        for name, item in _walk(h5py, file):
            if item.external or item.is_virtual:
                raise InputError(f"{name} has its numbers in another file")
            found[name] = Spec(tuple(item.shape or ()), item.dtype)
        check_inflated(path, sum(spec.nbytes for spec in found.values()))
    return found


def _walk(h5py: Any, file: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset once, with a path to it."""
    groups = [("", file)]
    seen = {h5py.h5o.get_info(file.id).addr}  # a group may hold itself
    while groups:
        parent, group = groups.pop()
        check_number(len(seen) + len(group))
        for key in group:
            name = f"{parent}/{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise InputError(f"{name} is a link, which Keras never writes")
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif isinstance(item, h5py.Group) and name.count("/") <= DEEPEST:
                groups.append((name, item))
            else:
                raise InputError(f"{name} is no array, or lies too deep")
