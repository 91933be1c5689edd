// A process of peers: each has documents and a connection, and does what its driver says.
//
// Commands come as JSON lines on standard input, `{id, peer, do, …}`; answers leave as lines on
// standard output, `{id, …}` or `{id, error}`, and what should not have happened as `{fault}`.
// `tests/convergence/peers.py` is the driver; `tests/convergence/python_peers.py` does the same.
import {createInterface} from 'node:readline';
import {createWebSocketSyncConnector} from '@sqlrooms/crdt/dist/sync/webSocketSyncConnector.js';
import {LoroDoc, VersionVector, decodeImportBlobMeta} from 'loro-crdt';
import {edit, numbers} from './room_edits.mjs';

const RECONNECT_MS = 20;

// The connector tells every lost connection.
console.warn = () => {};

function say(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

const base64 = (bytes) => Buffer.from(bytes).toString('base64');
const fromBase64 = (text) => new Uint8Array(Buffer.from(text, 'base64'));
const includes = (version, other) => (version.compare(other) ?? -1) >= 0;

/** A document of one room, and which of its own changes the server has acked. */
class Copy {
  constructor(room, number) {
    this.room = room;
    this.number = number;
    this.doc = new LoroDoc();
    this.doc.setPeerId(number);
    this.edits = 0;
    this.ranges = [];
    this.stored = 0;
    this.disconnected();
  }

  disconnected() {
    /** Answers that are to come, in this order. */
    this.expected = [];
    this.isJoined = false;
    this.isRefused = false;
    this.awaited = undefined;
  }

  /** How many changes of its own it has. */
  get end() {
    return this.doc.oplogVersion().get(this.number) ?? 0;
  }

  get isAcked() {
    return this.isJoined && !this.expected.length && this.stored === this.end;
  }

  /** Its own changes from `start` to `end` are stored. */
  store([start, end]) {
    this.ranges.push([start, end]);
    this.ranges.sort((a, b) => a[0] - b[0]);
    for (const range of this.ranges) {
      if (range[0] <= this.stored) this.stored = Math.max(this.stored, range[1]);
    }
    this.ranges = this.ranges.filter((range) => range[1] > this.stored);
  }

  /** Which of its own changes are in an export. */
  own(bytes) {
    const meta = decodeImportBlobMeta(bytes, false);
    return [
      meta.partialStartVersionVector.get(this.number) ?? 0,
      meta.partialEndVersionVector.get(this.number) ?? 0,
    ];
  }

  /** What comes from the server never waits for something else. */
  import(bytes) {
    const {pending} = this.doc.import(bytes);
    if (pending?.size) throw new Error(`room ${this.room}: an update came before what it needs`);
  }
}

/** What both kinds of peers do. `copies` are the documents, by their rooms. */
class Peer {
  constructor(name, copies) {
    this.name = name;
    this.copies = new Map(copies.map((copy) => [copy.room, copy]));
    this.waiting = [];
  }

  copy(room) {
    return this.copies.get(room);
  }

  fault(text) {
    say({fault: `${this.name}: ${text}`});
  }

  guarded(action) {
    try {
      action();
    } catch (error) {
      this.fault(error.stack ?? String(error));
    }
    this.look();
  }

  /** Resolves once `condition` holds, which is asked whenever something has come. */
  until(condition) {
    return new Promise((resolve) => {
      this.waiting.push({condition, resolve});
      this.look();
    });
  }

  look() {
    const left = [];
    for (const waiter of this.waiting) {
      if (waiter.condition()) waiter.resolve();
      else left.push(waiter);
    }
    this.waiting = left;
  }

  edit({room, seed, size}) {
    const copy = this.copy(room);
    copy.edits += 1;
    const mark = `${copy.number}:${copy.edits}`;
    edit(copy.doc, seed, mark, size);
    this.edited(copy);
    return {edits: [{mark, end: copy.end, number: copy.number}]};
  }

  edited() {}

  acked() {
    const found = [...this.copies.values()].map((copy) => [copy.room, copy.number, copy.stored]);
    return {acked: found};
  }

  /** Once everything is acked, on a connection that was alive after this was asked. */
  async settle() {
    this.proof = undefined;
    this.isProving = true;
    this.prove();
    await this.until(
      () =>
        this.proof &&
        this.proof === this.socket &&
        [...this.copies.values()].every((copy) => copy.isAcked),
    );
    this.isProving = false;
    return {};
  }

  prove() {
    if (this.isProving && this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send('{"type":"hello"}');
    }
  }

  async reach({room, version}) {
    const wanted = VersionVector.decode(fromBase64(version));
    await this.until(() => includes(this.copy(room).doc.oplogVersion(), wanted));
    return {};
  }

  state({room}) {
    const {doc} = this.copy(room);
    const version = Object.fromEntries(doc.oplogVersion().toJSON());
    return {value: doc.toJSON(), version};
  }

  describe() {
    const copies = [...this.copies.values()].map(
      (copy) =>
        `${copy.room}: joined ${copy.isJoined}, stored ${copy.stored} of ${copy.end}, ` +
        `expects ${JSON.stringify(copy.expected)}`,
    );
    const state = this.socket?.readyState;
    return {text: `socket ${state}, proof ${this.proof === this.socket}; ${copies.join('; ')}`};
  }
}

/** The published connector, unmodified. Its socket is watched, nothing else. */
class ConnectorPeer extends Peer {
  constructor(name, {url, token, numbers}) {
    super(name, Object.entries(numbers).map(([room, number]) => new Copy(room, number)));
    [this.only] = this.copies.values();
    this.url = url;
    this.token = token;
  }

  connect() {
    this.connector ??= createWebSocketSyncConnector({
      url: this.url,
      roomId: this.only.room,
      token: this.token,
      initialDelayMs: 1,
      maxDelayMs: RECONNECT_MS,
      createSocket: (url) => this.open(url),
    });
    void this.connector.connect(this.only.doc);
    return {};
  }

  open(url) {
    const socket = new WebSocket(url);
    // One that fails is closed, says the standard. To Node 20 it may be connecting for ever, and
    // the connector would wait for it.
    socket.addEventListener('error', () => {
      Object.defineProperty(socket, 'readyState', {value: WebSocket.CLOSED});
    });
    const {only} = this;
    only.disconnected();
    this.socket = socket;
    const send = socket.send.bind(socket);
    socket.send = (data) => {
      if (typeof data !== 'string') only.expected.push(['crdt-update-ack', only.own(data)]);
      else {
        const {type, data: snapshot} = JSON.parse(data);
        if (type === 'crdt-join') only.expected.push(['crdt-joined'], ['crdt-snapshot']);
        if (type === 'crdt-snapshot') {
          only.expected.push(['crdt-snapshot-ack', only.own(fromBase64(snapshot))]);
        }
      }
      send(data);
    };
    // The connector listens, too, and comes later.
    const later = (action) => setImmediate(() => this.guarded(action));
    socket.addEventListener('open', () => later(() => this.prove()));
    socket.addEventListener('message', ({data}) => {
      if (this.socket !== socket) return;
      if (typeof data !== 'string') later(() => {});
      else later(() => this.socket === socket && this.told(JSON.parse(data)));
    });
    return socket;
  }

  told(message) {
    const {only} = this;
    if (message.type === 'welcome') {
      this.proof = this.socket;
      return;
    }
    // A join that is refused since the server stops has the rest refused, too.
    only.isRefused ||= message.code === 'shutting_down';
    if (only.isRefused) return;
    const [kind, own] = only.expected.shift() ?? [];
    if (message.type !== kind) {
      throw new Error(`expected ${kind}, got ${JSON.stringify(message).slice(0, 300)}`);
    }
    if (kind === 'crdt-snapshot') only.isJoined = true;
    if (own) only.store(own);
  }

  disconnect() {
    const {connector} = this;
    this.connector = undefined;
    this.socket = undefined;
    this.only.disconnected();
    void connector?.disconnect();
    return {};
  }

  /** The page is loaded again: a new document, and a new connector. */
  refresh({numbers: peerNumbers}) {
    const acked = this.acked();
    const [[room, number]] = Object.entries(peerNumbers);
    const isConnected = this.connector !== undefined;
    this.disconnect();
    this.only = new Copy(room, number);
    this.copies = new Map([[room, this.only]]);
    if (isConnected) this.connect();
    return acked;
  }
}

/** Speaks the second part of the protocol: versions, several rooms, ids and statuses. */
class VersionsPeer extends Peer {
  constructor(name, {url, token, numbers: peerNumbers, seed}) {
    super(name, Object.entries(peerNumbers).map(([room, number]) => new Copy(room, number)));
    this.url = token === undefined ? url : `${url}/?token=${encodeURIComponent(token)}`;
    this.below = numbers(seed);
    this.left = new Set();
    this.ids = 0;
  }

  connect() {
    this.isWanted = true;
    if (!this.socket) this.open();
    return {};
  }

  open() {
    if (!this.isWanted || this.socket) return;
    const socket = new WebSocket(this.url);
    socket.binaryType = 'arraybuffer';
    this.socket = socket;
    const current = (action) => (event) => {
      if (this.socket === socket) this.guarded(() => action(event));
    };
    const lost = current(() => {
      this.disconnected();
      setTimeout(() => this.open(), RECONNECT_MS);
    });
    socket.addEventListener('close', lost);
    socket.addEventListener('error', lost);
    socket.addEventListener('open', current(() => {
      for (const room of this.copies.keys()) if (!this.left.has(room)) this.join({room});
      this.prove();
    }));
    socket.addEventListener('message', current(({data}) => {
      if (typeof data === 'string') this.told(JSON.parse(data));
      else this.updated(new Uint8Array(data));
    }));
  }

  disconnected() {
    const {socket} = this;
    // Closing one that failed tells so again, at once.
    this.socket = undefined;
    socket?.close();
    for (const copy of this.copies.values()) copy.disconnected();
  }

  disconnect() {
    this.isWanted = false;
    this.disconnected();
    return {};
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  join({room}) {
    const copy = this.copy(room);
    this.left.delete(room);
    if (!this.isOpen) return {};
    const version = copy.doc.oplogVersion();
    const isEmpty = version.length() === 0 || this.below(4) === 0;
    this.send({type: 'crdt-join', roomId: room, version: isEmpty ? '' : base64(version.encode())});
    copy.expected.push(['crdt-joined']);
    // Without waiting for the answer, what the server has not acked.
    if (this.below(3) === 0) this.sendSince(copy, this.versionBefore(copy, copy.stored));
    return {};
  }

  leave({room}) {
    this.left.add(room);
    if (!this.isOpen) return {};
    this.send({type: 'crdt-leave', roomId: room});
    this.copy(room).expected.push(['crdt-left']);
    return {};
  }

  /** The version of a copy without its own changes from `end` on. */
  versionBefore(copy, end) {
    const version = copy.doc.oplogVersion();
    version.remove(copy.number);
    if (end) version.setEnd({peer: copy.number, counter: end});
    return version;
  }

  edited(copy) {
    if (!copy.isJoined || this.left.has(copy.room)) return;
    this.sendSince(copy, this.versionBefore(copy, copy.sent));
    copy.sent = copy.end;
  }

  sendSince(copy, version) {
    const update = copy.doc.export({mode: 'update', from: version});
    const own = [version.get(copy.number) ?? 0, copy.end];
    this.ids += 1;
    const header = Buffer.from(
      JSON.stringify({type: 'crdt-update', roomId: copy.room, id: this.ids}),
    );
    const head = Buffer.alloc(4);
    head.writeUInt32BE(header.length);
    copy.expected.push(['crdt-update-ack', own, this.ids]);
    this.socket.send(Buffer.concat([head, header, update]));
  }

  send(message) {
    this.socket.send(JSON.stringify(message));
  }

  told(message) {
    if (message.type === 'welcome') {
      this.proof = this.socket;
      return;
    }
    const copy = this.copy(message.roomId);
    const text = JSON.stringify(message).slice(0, 300);
    if (!copy) throw new Error(`about no room of it: ${text}`);
    // A join that is refused since the server stops has the rest refused, too.
    copy.isRefused ||= message.code === 'shutting_down';
    if (copy.isRefused) return;
    for (let left = message.count ?? 1; left > 0; left -= 1) {
      const [kind, own, id] = copy.expected.shift() ?? [];
      if (message.type !== kind) throw new Error(`expected ${kind}, got ${text}`);
      if (kind === 'crdt-joined') {
        if (message.reset) throw new Error(`history that was never cut is gone: ${text}`);
        copy.awaited = VersionVector.decode(fromBase64(message.version));
      } else if (kind === 'crdt-left') copy.isJoined = false;
      else {
        if (!['applied', 'pending'].includes(message.status)) throw new Error(text);
        if (left === 1 && id !== message.id) throw new Error(`expected id ${id}, got ${text}`);
        copy.store(own);
      }
    }
  }

  updated(bytes) {
    const start = 4 + Buffer.from(bytes.buffer, bytes.byteOffset).readUInt32BE();
    const {roomId} = JSON.parse(Buffer.from(bytes.subarray(4, start)).toString());
    const copy = this.copy(roomId);
    if (!copy.awaited && !copy.isJoined) throw new Error(`an update of ${roomId}, not joined`);
    copy.import(bytes.subarray(start));
    if (!copy.awaited) return;
    const server = copy.awaited;
    copy.awaited = undefined;
    if (!includes(copy.doc.oplogVersion(), server)) {
      throw new Error(`room ${roomId}: the document is not at the version of crdt-joined`);
    }
    copy.isJoined = true;
    copy.sent = copy.end;
    // The server tells nobody of changes that it has not stored.
    copy.store([0, server.get(copy.number) ?? 0]);
    if (this.left.has(roomId) || includes(server, copy.doc.oplogVersion())) return;
    this.sendSince(copy, server);
  }

  refresh({numbers: peerNumbers}) {
    const acked = this.acked();
    this.disconnected();
    for (const [room, number] of Object.entries(peerNumbers)) {
      this.copies.set(room, new Copy(room, number));
    }
    this.open();
    return acked;
  }
}

const KINDS = {connector: ConnectorPeer, versions: VersionsPeer};
const peers = new Map();

async function run(command) {
  if (command.do === 'create') {
    peers.set(command.peer, new KINDS[command.kind](command.peer, command));
    return {};
  }
  const peer = peers.get(command.peer);
  if (command.do === 'end') {
    peer.disconnect();
    peers.delete(command.peer);
    return {};
  }
  return peer[command.do](command);
}

createInterface({input: process.stdin})
  .on('line', (line) => {
    const command = JSON.parse(line);
    run(command).then(
      (answer) => say({id: command.id, ...answer}),
      (error) => say({id: command.id, error: error.stack ?? String(error)}),
    );
  })
  .on('close', () => process.exit());
