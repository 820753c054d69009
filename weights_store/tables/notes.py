"""What a store says to people and programs that look into its folders without tokenweights.

The folder of a table is not a version of it. It holds the files of all versions, because old ones stay readable, and files
that a writer has not committed yet or left when it was killed. Which of them are a version, only Delta's log says; a reader
that takes all files gets rows twice. So each table's folder has a file that ends in .parquet and holds none: what reads the
folder as plain Parquet fails with an error that names this file, and its name says what to do. Readers of Delta never open
it, because no commit names it. The README at the root of the store explains the rest.
"""

from pathlib import Path

from weights_store.location import Location

README = "README.md"
"""At the root of a store."""

NOT_A_VERSION = "00-not-a-version-see-tokenweights-path.parquet"
"""In the folder of every table. Shards begin with a time, so it is the first in any listing, and the first to be read."""

_TEXT = """\
This is not a Parquet file. It is here so that nothing reads this folder as plain Parquet.

The folder holds the files of all versions of a table, so reading all of them gives rows twice. Read the table as a Delta
table, or read the files that `tokenweights path NAME` prints. README.md at the root of the store says more.
"""


def put_notes(root: Location, table: Location) -> None:
    """Write the notes of a store and of one of its tables, each only if nothing is in its place.

    Raises:
        OSError: The folder cannot be written.
        StoreError: The object store does not answer as it should.
    """
    if not root.exists(README):
        root.write(README, Path(__file__).with_name("store_readme.md").read_bytes())
    if not table.exists(NOT_A_VERSION):
        table.write(NOT_A_VERSION, _TEXT.encode())
