"""Write a small file so that it is there whole or not at all."""

from pathlib import Path

from weights_store.location import Location


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; a kill leaves the old file or the new one."""
    Location(str(path.parent)).write(path.name, text.encode())
