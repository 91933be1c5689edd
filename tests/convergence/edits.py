"""Random edits of a Loro document: maps, lists, texts, trees, movable lists, and one in another.

``tests/browser/room_edits.mjs`` does the same in JavaScript.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from loro import LoroDoc, LoroList, LoroMap, LoroMovableList, LoroText, LoroTree, ValueOrContainer

_LETTERS = "abc déç漢字🦆"
_KEYS = 8


def edit(doc: LoroDoc, seed: int, mark: str, size: int) -> None:
    """A few edits and one that nobody overwrites, ``mark``; ``size`` letters more. Commits them."""
    numbers = random.Random(seed)
    roots: list[Callable[[str], Any]] = [
        doc.get_map,
        doc.get_list,
        doc.get_movable_list,
        doc.get_text,
        doc.get_tree,
    ]
    names = ["map", "list", "movable", "text", "tree"]
    for _ in range(numbers.randint(1, 4)):
        choice = numbers.randrange(len(roots))
        _change(roots[choice](names[choice]), numbers)
    doc.get_map("marks").insert(mark, seed)
    if size:
        doc.get_map("large").insert(_key(numbers), numbers.randbytes(size // 2).hex())
    doc.commit()


def _change(target: Any, numbers: random.Random) -> None:
    """Change one thing in whatever container is given."""
    for kind, change in _CHANGES:
        if isinstance(target, kind):
            change(target, numbers)


def _change_map(target: Any, numbers: random.Random) -> None:
    key = _key(numbers)
    held = target.get(key)
    if isinstance(held, ValueOrContainer.Container) and numbers.randrange(3):
        _change(held.container, numbers)
    elif numbers.randrange(6) == 0:
        if held is not None:
            target.delete(key)
    elif numbers.randrange(6) == 0:
        target.insert_container(key, numbers.choice((LoroList, LoroText, LoroMap))())
    else:
        target.insert(key, _scalar(numbers))


def _change_list(target: Any, numbers: random.Random) -> None:
    at = numbers.randint(0, len(target))
    if at < len(target) and numbers.randrange(3) == 0:
        target.delete(at, 1)
    else:
        target.insert(at, _scalar(numbers))


def _change_movable_list(target: Any, numbers: random.Random) -> None:
    at = numbers.randint(0, len(target))
    choice = numbers.randrange(5)
    if at == len(target) or choice < 2:
        target.insert(at, _scalar(numbers))
    elif choice == 2:
        target.delete(at, 1)
    elif choice == 3:
        target.set(at, _scalar(numbers))
    else:
        target.mov(at, numbers.randrange(len(target)))


def _change_text(target: Any, numbers: random.Random) -> None:
    at = numbers.randint(0, target.len_unicode)
    if at < target.len_unicode and numbers.randrange(3) == 0:
        target.delete(at, 1)
    else:
        target.insert(at, _word(numbers))


def _change_tree(target: Any, numbers: random.Random) -> None:
    nodes = [node.id for node in target.get_nodes(False)]
    node = numbers.choice([*nodes, None])
    choice = numbers.randrange(4)
    if node is None or choice == 0:
        target.create(node)
    elif choice == 1:
        target.get_meta(node).insert(_key(numbers), _scalar(numbers))
    elif choice == 2:
        target.delete(node)
    else:
        try:
            target.mov(node, numbers.choice(nodes))
        except BaseException as error:
            # Loro's errors are no better than that. A node cannot be moved below itself.
            if "Cycle" not in str(error):
                raise


_CHANGES: list[tuple[type, Callable[[Any, random.Random], None]]] = [
    (LoroMap, _change_map),
    (LoroList, _change_list),
    (LoroMovableList, _change_movable_list),
    (LoroText, _change_text),
    (LoroTree, _change_tree),
]


def _key(numbers: random.Random) -> str:
    return f"k{numbers.randrange(_KEYS)}"


def _word(numbers: random.Random) -> str:
    return "".join(numbers.choices(_LETTERS, k=numbers.randint(1, 6)))


def _scalar(numbers: random.Random) -> Any:
    return numbers.choice(
        (True, None, numbers.randint(-500, 499), numbers.randrange(1000) / 8, _word(numbers))
    )
