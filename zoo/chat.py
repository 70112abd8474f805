"""Conversations derived from the docstrings of the training split, by parsing alone."""

import ast
import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.corpus import TOPICS_FILE, SourceFile, read_text

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a concise assistant for Python programmers.",
)
LONGEST_PARAGRAPH = 600
LONGEST_SOURCE_LINES = 24


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    question: str
    answer: str


def turn(role: str, content: str) -> str:
    """Return one turn as the chat template renders it."""
    return f"<|{role}|>\n{content}<|end|>\n"


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def public_definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, Definition]]:
    """Yield the dotted name and node of each public function, class and method."""
    pending: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, tree)]
    while pending:
        prefix, parent = pending.pop(0)
        for node in parent.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                name = f"{prefix}.{node.name}"
                yield name, node
                if isinstance(node, ast.ClassDef):
                    pending.append((name, node))


def signature(node: Definition) -> str:
    """Return the first line of a definition, without decorators and without its body."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def source_without_docstring(node: Definition) -> str | None:
    """Return the code of a short function without its docstring, None if nothing is left."""
    if isinstance(node, ast.ClassDef) or len(node.body) < 2:
        return None
    body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
    if body.count("\n") >= LONGEST_SOURCE_LINES:
        return None
    indented = "\n".join("    " + line for line in body.split("\n"))
    return f"{signature(node)}\n{indented}"


def exchanges_of(name: str, node: Definition) -> list[Exchange]:
    """Return the exchanges that one documented definition gives."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return []
    summary = first_paragraph(docstring)
    if not 20 <= len(summary) <= LONGEST_PARAGRAPH:
        return []
    first_line = f"```python\n{signature(node)}\n```"
    exchanges = [
        Exchange(f"What does {name} do?", summary),
        Exchange(f"Show the signature of {name}.", first_line),
    ]
    code = source_without_docstring(node)
    if code:
        question = f"Write a docstring for this function:\n```python\n{code}\n```"
        exchanges.append(Exchange(question, f'"""{summary}"""'))
    return exchanges


def module_exchanges(tree: ast.Module, module: str) -> list[Exchange]:
    """Return the exchanges of one parsed module, in the order of its definitions."""
    exchanges = []
    docstring = ast.get_docstring(tree)
    if docstring and 20 <= len(first_paragraph(docstring)) <= LONGEST_PARAGRAPH:
        exchanges.append(Exchange(f"What is the module {module} for?", first_paragraph(docstring)))
    for name, node in public_definitions(tree, module):
        exchanges += exchanges_of(name, node)
    return exchanges


def conversations(exchanges: list[Exchange], generator: random.Random) -> Iterator[str]:
    """Yield chat documents of one or two exchanges each, some behind a system prompt."""
    remaining = list(exchanges)
    generator.shuffle(remaining)
    while remaining:
        document = ""
        if generator.random() < 0.2:
            document += turn("system", generator.choice(SYSTEM_PROMPTS))
        for _ in range(min(len(remaining), 2 if generator.random() < 0.25 else 1)):
            exchange = remaining.pop()
            document += turn("user", exchange.question) + turn("assistant", exchange.answer)
        yield document


def chat_documents(files: list[SourceFile], root: Path, seed: int) -> list[str]:
    """Return every chat document of the training split, shuffled by ``seed``."""
    generator = random.Random(seed)
    documents: list[str] = []
    for file in files:
        if file.split != "train" or file.path == TOPICS_FILE:
            continue
        try:
            tree = ast.parse(read_text(file, root))
        except SyntaxError:
            continue
        module = file.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        documents += conversations(module_exchanges(tree, module), generator)
    generator.shuffle(documents)
    return documents
