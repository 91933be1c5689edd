// Random edits of a Loro document: maps, lists, texts, trees, movable lists, and one in another.

import {LoroList, LoroMap, LoroText} from 'loro-crdt';

const LETTERS = [...'abc déç漢字🦆'];
const KEYS = 8;

/** Numbers from 0 to below n, the same for the same seed (mulberry32). */
export function numbers(seed) {
  let state = seed >>> 0;
  return (n) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * n);
  };
}

function word(below) {
  return Array.from({length: 1 + below(6)}, () => LETTERS[below(LETTERS.length)]).join('');
}

function scalar(below) {
  return [true, null, below(1000) - 500, below(1000) / 8, word(below)][below(5)];
}

function container(below) {
  return [new LoroList(), new LoroText(), new LoroMap()][below(3)];
}

/** Changes one thing in whatever container is given. */
function change(target, below) {
  switch (target.kind()) {
    case 'Map': {
      const key = `k${below(KEYS)}`;
      const nested = target.get(key);
      if (typeof nested?.kind === 'function' && below(3)) change(nested, below);
      else if (below(6) === 0) target.delete(key);
      else if (below(6) === 0) target.setContainer(key, container(below));
      else target.set(key, scalar(below));
      break;
    }
    case 'List': {
      const at = below(target.length + 1);
      if (at < target.length && below(3) === 0) target.delete(at, 1);
      else target.insert(at, scalar(below));
      break;
    }
    case 'MovableList': {
      const at = below(target.length + 1);
      const choice = below(5);
      if (at === target.length || choice < 2) target.insert(at, scalar(below));
      else if (choice === 2) target.delete(at, 1);
      else if (choice === 3) target.set(at, scalar(below));
      else target.move(at, below(target.length));
      break;
    }
    case 'Text': {
      // Positions count UTF-16 units; a character must not be cut in two.
      const characters = [...target.toString()];
      const units = (count) => characters.slice(0, count).join('').length;
      const at = below(characters.length + 1);
      if (at < characters.length && below(3) === 0) {
        target.delete(units(at), units(at + 1) - units(at));
      } else target.insert(units(at), word(below));
      break;
    }
    case 'Tree': {
      const nodes = target.getNodes({withDeleted: false});
      const node = nodes[below(nodes.length + 1)];
      const choice = below(4);
      if (!node || choice === 0) target.createNode(node?.id);
      else if (choice === 1) node.data.set(`k${below(KEYS)}`, scalar(below));
      else if (choice === 2) target.delete(node.id);
      else {
        try {
          target.move(node.id, nodes[below(nodes.length)].id);
        } catch {
          // Below itself: Loro refuses.
        }
      }
    }
  }
}

/** A few edits and one that nobody overwrites, `mark`; `size` letters more. Commits them. */
export function edit(doc, seed, mark, size) {
  const below = numbers(seed);
  const roots = [
    () => doc.getMap('map'),
    () => doc.getList('list'),
    () => doc.getMovableList('movable'),
    () => doc.getText('text'),
    () => doc.getTree('tree'),
  ];
  for (let left = 1 + below(4); left > 0; left -= 1) change(roots[below(roots.length)](), below);
  doc.getMap('marks').set(mark, seed);
  if (size) {
    const large = Array.from({length: size / 4}, () => below(36 ** 4).toString(36)).join('');
    doc.getMap('large').set(`k${below(KEYS)}`, large);
  }
  doc.commit();
}
