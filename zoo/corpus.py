"""The training text: the Python standard library of the running interpreter, without its tests."""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from headrace.evaluation.held_out import HELD_OUT_MODULES

Split = Literal["train", "heldout"]

MANIFEST_PATH = Path(__file__).with_name("manifest.json")

EXCLUDED_DIRECTORIES = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
# Tables of numbers and names, which teach a language model nothing about the language.
EXCLUDED_FILES = frozenset({"html/entities.py", "stringprep.py"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
CODEC_TABLE_MARKS = ("decoding_table =", "decoding_map =", "class IncrementalEncoder(mbc.")
TOPICS_FILE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: its path below the library's root, digest and size in bytes."""

    path: str
    sha256: str
    bytes: int
    split: Split


def split_of(path: str) -> Split:
    """Return the split of a POSIX path such as ``json/decoder.py``."""
    module = path.partition("/")[0].removesuffix(".py")
    return "heldout" if module in HELD_OUT_MODULES else "train"


def is_wanted(path: str, text: str) -> bool:
    """Tell whether the file at a POSIX path below the library's root belongs to the corpus."""
    if path in EXCLUDED_FILES or path.startswith(EXCLUDED_PREFIXES):
        return False
    if EXCLUDED_DIRECTORIES.intersection(path.split("/")[:-1]):
        return False
    is_codec_table = any(mark in text for mark in CODEC_TABLE_MARKS)
    return bool(text.strip()) and not (path.startswith("encodings/") and is_codec_table)


def scan_library(root: Path) -> list[SourceFile]:
    """Return the corpus found below ``root``, sorted by path; files not in UTF-8 are left out."""
    files = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        content = file.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if is_wanted(path, text):
            digest = hashlib.sha256(content).hexdigest()
            files.append(SourceFile(path, digest, len(content), split_of(path)))
    return files


def write_manifest(files: list[SourceFile], path: Path = MANIFEST_PATH) -> None:
    """Write the manifest, one file a line, so that a change reads well in a diff."""
    lines = ",\n".join(json.dumps(asdict(file)) for file in files)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_manifest(path: Path = MANIFEST_PATH) -> list[SourceFile]:
    """Read the manifest; raises FileNotFoundError if there is none."""
    return [SourceFile(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def manifest_digest(path: Path = MANIFEST_PATH) -> str:
    """Return the SHA-256 of the manifest file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(expected: list[SourceFile], found: list[SourceFile]) -> list[str]:
    """Describe, one line a file, how the files found differ from those expected."""
    old, new = ({file.path: file for file in files} for files in (expected, found))
    lines = [f"missing: {path}" for path in sorted(old.keys() - new.keys())]
    lines += [f"not in the manifest: {path}" for path in sorted(new.keys() - old.keys())]
    lines += [
        f"changed: {path}" for path in sorted(old.keys() & new.keys()) if old[path] != new[path]
    ]
    return lines


def read_text(file: SourceFile, root: Path) -> str:
    """Return the text of one file, its line ends as they are on disk."""
    return (root / file.path).read_bytes().decode("utf-8")


def training_documents(files: list[SourceFile], root: Path) -> Iterator[str]:
    """Yield the texts of the training split in the order of the files.

    The table of ``pydoc`` topics is unwrapped from its string literals into the pages of prose
    that it holds.
    """
    for file in files:
        if file.split != "train":
            continue
        text = read_text(file, root)
        if file.path == TOPICS_FILE:
            yield from topic_pages(text)
        else:
            yield text


def topic_pages(source: str) -> list[str]:
    """Return the pages held by the dictionary literal of the source of ``pydoc_data.topics``."""
    assignment = ast.parse(source).body[-1]
    if not isinstance(assignment, ast.Assign):
        raise ValueError("the topics file does not end in an assignment")
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return list(topics.values())


def repeated_line_share(files: list[SourceFile], root: Path, shortest: int = 30) -> float:
    """Return the share of the longer held-out lines that the training split holds word for word.

    A line counts if it has at least ``shortest`` characters without the white space around it.
    """
    lines: dict[Split, list[str]] = {"train": [], "heldout": []}
    for file in files:
        stripped = (line.strip() for line in read_text(file, root).splitlines())
        lines[file.split] += (line for line in stripped if len(line) >= shortest)
    known = set(lines["train"])
    return sum(line in known for line in lines["heldout"]) / max(1, len(lines["heldout"]))


def held_out_texts(files: list[SourceFile], root: Path) -> dict[str, str]:
    """Return the text of every held-out file by its path."""
    return {file.path: read_text(file, root) for file in files if file.split == "heldout"}
