"""Instructions and their answers, or whole conversations, from lines of JSON.

Only what the assistant says is scored; what it answers to is only seen. An example is
one document: rows hold it whole, and none sees another.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.documents import Span
from moe_jax.data.sources import text_files
from moe_jax.errors import UserError

_ROLES = ("system", "user", "assistant")
_HOLE = "{}"


@config_lib.node
class Instructions(config_lib.SourceConfig):
    """Files with one JSON object a line.

    An object has `messages`, a list of `{"role": ..., "content": ...}` with the roles
    system, user and assistant, or else a prompt and an answer. Each message is put into
    the format of its role, where special tokens may be named; in the message itself
    they are text. Of an assistant's message the content, and what the format has behind
    it, is scored, and the tokenizer's end of document, where the last one is its.

    Attributes:
      path: a file, a folder (all files below it but hidden ones) or a glob.
      prompt: field of the prompt.
      answer: field of the answer.
      messages: field of the messages.
      system: format of the system's message, with one `{}`.
      user: of a user's.
      assistant: of an assistant's.
    """

    path: str = ""
    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    system: str = "{}\n"
    user: str = "User: {}\n"
    assistant: str = "Assistant: {}\n"

    def problems(self, path, root):
        if not self.path:
            yield f"{path}.path='': must name a file, a folder or a glob"
        for role in _ROLES:
            if (given := getattr(self, role)).count(_HOLE) != 1:
                yield f"{path}.{role}={given!r}: must hold {_HOLE!r} exactly once"


def load(
    source: Instructions, validation_fraction: float, folder: Path
) -> documents.Documents:
    """Finds the files and hashes what they hold.

    Raises:
      UserError: nothing is there, or a line is not what `Instructions` says.
    """
    del folder
    files = text_files.find(source)
    digest = hashlib.sha256(repr(source).encode())
    for name, path in files:
        digest.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "replace"))
        digest.update(text_files.file_digest(path, source))

    def read(split: str) -> Iterator[tuple[str, documents.Text]]:
        names = [name for name, _ in _lines(files)]
        held_out = documents.held_out(names, validation_fraction)
        for (name, line), held in zip(_lines(files), held_out, strict=True):
            if held == (split == "validation"):
                yield name, _spans(source, line, name)

    identity = {"kind": "instructions", "sha256": digest.hexdigest()}
    return documents.Documents(identity, read, examples=True)


def _lines(files: list[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
    """(file:number, line) of all lines that are not empty."""
    for name, path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{name}:{number}", line


def _spans(source: Instructions, line: bytes, name: str) -> tuple[Span, ...]:
    found = []
    for role, content in _messages(source, line, name):
        before, after = getattr(source, role).split(_HOLE)
        answers = role == "assistant"
        found.append(Span(before.encode(), scored=False, markup=True))
        found.append(Span(content.encode(), scored=answers))
        found.append(Span(after.encode(), scored=answers, markup=True))
    return tuple(found)


def _messages(
    source: Instructions, line: bytes, name: str
) -> Iterator[tuple[str, str]]:
    try:
        example = json.loads(line)
    except ValueError as error:
        raise _bad(source, name, f"is not JSON ({error})") from None
    if not isinstance(example, dict):
        raise _bad(source, name, "is no JSON object")
    if source.messages in example:
        messages = _checked(source, example[source.messages], name)
    else:
        fields = {source.prompt: "user", source.answer: "assistant"}
        if missing := [field for field in fields if field not in example]:
            raise _bad(
                source,
                name,
                f"has neither {source.messages!r} nor {missing[0]!r}; it has "
                f"{sorted(example)}",
            )
        messages = [(role, example[field]) for field, role in fields.items()]
    for role, content in messages:
        if not isinstance(content, str):
            raise _bad(source, name, f"has a message of role {role!r} that is no text")
    if not any(role == "assistant" and content for role, content in messages):
        raise _bad(source, name, "has no answer, so nothing to learn")
    yield from messages


def _checked(source: Instructions, given: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(given, list):
        raise _bad(source, name, f"has {source.messages!r} that are no list")
    found = []
    for message in given:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise _bad(source, name, f"has a message of role {role!r}, not of {_ROLES}")
        found.append((role, message.get("content")))
    return found


def _bad(source: Instructions, name: str, what: str) -> UserError:
    return UserError(
        f"data.source.path={source.path!r}: line {name} {what}; mend it, or name the "
        "fields (data.source.prompt, .answer, .messages)"
    )
