"""How folders of this machine are named in what is published, and where they are.

A manifest says what a base was made of, and an adapter's config which base it is for. A hub id says so to everyone. The
path of a folder says nothing to others but what this disk looks like, so a folder that is near is named from where the
name stands ("../base"), any other by its last part ("./base"), and this machine remembers its place.
"""

from __future__ import annotations

import os
from pathlib import Path

from qosora.remembered import recall, remember

__all__ = ["place_of", "published_name"]

_SUBJECT = "places"
#: Steps up and down at most to a folder that counts as near: from runs/a to bases/b there are two of each.
_STEPS = 2


def published_name(
    place: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, key: str | None = None
) -> str:
    """Return the name of a model for a file in a folder.

    Args:
        place: Its folder, file or hub id.
        folder: Where the file will be; without it all but hub ids are named by their last part.
        key: By which `place_of` finds the place again.
    """
    place = os.fspath(place)
    path = Path(place).expanduser()
    if not place or not (path.is_absolute() or path.exists()):
        return place  # a hub id
    real = os.path.realpath(path)
    if key:
        remember(_SUBJECT, {key: real})
    return _from(real, os.path.realpath(folder)) if folder is not None else f"./{os.path.basename(real)}"


def _from(place: str, folder: str) -> str:
    """Return the way to a place from a folder that is near, else the last part of its name."""
    shared = Path(os.path.commonpath([place, folder])) if Path(place).drive == Path(folder).drive else None
    way = os.path.relpath(place, folder).split(os.sep) if shared and shared != Path(shared.anchor) else []
    near = 1 <= way.count(os.pardir) <= _STEPS and len(way) - way.count(os.pardir) <= _STEPS
    return "/".join(way) if near else f"./{os.path.basename(place)}"


def place_of(name: str, folder: str | os.PathLike[str] | None = None, key: str | None = None) -> str:
    """Return the place of what a file calls by a name; the name where it is none of ours, or not to be found.

    Args:
        name: As `published_name` made it, or an older version of qosora, or a hub id.
        folder: Where the file is, if known.
        key: As given to `published_name`.
    """
    if name.split("/")[0] not in (os.curdir, os.pardir):
        return name
    if folder is not None and (path := Path(folder, name)).exists():
        return os.path.realpath(path)
    known = recall(_SUBJECT).get(key) if key else None
    return known if isinstance(known, str) and os.path.exists(known) else name
