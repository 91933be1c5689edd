// The steps of the scenario of rooms: documents that clients share through the published connector.

import {createWebSocketSyncConnector} from '@sqlrooms/crdt/dist/sync/webSocketSyncConnector.js';
import {LoroDoc} from 'loro-crdt';
import {check, equal} from './checks.mjs';

/** A document and its connector. `server` is `{wsUrl, token?}`. */
class Client {
  constructor(server, roomId, options) {
    this.doc = new LoroDoc();
    this.sockets = [];
    this.connector = createWebSocketSyncConnector({
      url: server.wsUrl,
      token: server.token,
      roomId,
      initialDelayMs: 10,
      maxDelayMs: 50,
      createSocket: (url) => {
        this.sockets.push(new WebSocket(url));
        return this.sockets.at(-1);
      },
      ...options,
    });
  }

  connect() {
    void this.connector.connect(this.doc);
    return this;
  }

  get socket() {
    return this.sockets.at(-1);
  }

  set(key, value) {
    this.doc.getMap('map').set(key, value);
    this.doc.commit();
    return this;
  }

  push(value) {
    this.doc.getList('list').push(value);
    this.doc.commit();
    return this;
  }

  write(text) {
    this.doc.getText('text').insert(0, text);
    this.doc.commit();
    return this;
  }

  get map() {
    return this.doc.toJSON().map ?? {};
  }
}

/** Resolves when `condition` holds, which is asked after every change of the clients' documents. */
function until(clients, condition) {
  return new Promise((resolve) => {
    const look = () => {
      if (!condition()) return;
      for (const unsubscribe of subscriptions) unsubscribe();
      resolve();
    };
    const subscriptions = clients.map(({doc}) => doc.subscribe(look));
    look();
  });
}

/** The documents become equal and hold `map`. */
async function converge(clients, map) {
  const expected = JSON.stringify(Object.entries(map).sort());
  const has = (client) => JSON.stringify(Object.entries(client.map).sort()) === expected;
  const text = ({doc}) => JSON.stringify(doc.getDeepValueWithID());
  await until(clients, () => clients.every(has));
  await until(clients, () => clients.every((client) => text(client) === text(clients[0])));
}

/** Resolves when the connector says so. */
function becomes(client, status) {
  return new Promise((resolve) => {
    client.connector.setStatusListener((now) => now === status && resolve());
  });
}

/** The steps of one server; `name` is that of its rooms. */
function stepsWith(server, name) {
  let rooms = 0;
  const opened = [];
  /** Makes clients of a new room. */
  const inRoom = (options) => {
    rooms += 1;
    const room = `${name} ${rooms}`;
    return (more) => {
      const client = new Client(server, room, {...options, ...more});
      opened.push(client);
      return client;
    };
  };
  return {
    async 'an empty room'() {
      const join = inRoom();
      const [one, two] = [join().connect(), join().connect()];
      one.set('a', 1);
      await converge([one, two], {a: 1});
      two.set('b', 2);
      await converge([one, two], {a: 1, b: 2});
      const late = join().connect();
      await converge([one, two, late], {a: 1, b: 2});
    },

    async 'edits made before connecting'() {
      const join = inRoom();
      const one = join().set('before', 1).connect();
      const two = join().connect();
      await converge([one, two], {before: 1});
      const three = join().set('before too', 2).connect();
      await converge([one, two, three], {before: 1, 'before too': 2});
    },

    async 'without a snapshot on connecting'() {
      const join = inRoom({sendSnapshotOnConnect: false});
      // It sends its document when that of the room looks empty.
      const one = join().set('a', 1).connect();
      const two = join().connect();
      await converge([one, two], {a: 1});
      two.set('b', 2);
      await converge([one, two], {a: 1, b: 2});
    },

    async 'a page that is loaded again does not wipe the room'() {
      const join = inRoom();
      const stays = join().set('kept', 'yes').connect();
      const other = join().connect();
      await converge([stays, other], {kept: 'yes'});
      const expected = {kept: 'yes'};
      for (const time of ['once', 'twice']) {
        const again = join().connect();
        // Before the document of the room has come. To a key of its own, since of two values that
        // know nothing of each other either one may stay.
        again.set(time, true);
        expected[time] = true;
        await converge([stays, other, again], expected);
        await again.connector.disconnect();
      }
    },

    async 'edits made offline'() {
      const join = inRoom();
      const [one, two] = [join().connect(), join().connect()];
      one.set('a', 1);
      await converge([one, two], {a: 1});
      const closed = becomes(one, 'closed');
      one.socket.close();
      await closed;
      one.set('offline', 1);
      two.set('meanwhile', 2);
      await converge([one, two], {a: 1, offline: 1, meanwhile: 2});
      check(one.sockets.length > 1, 'it did not connect again');
      one.set('b', 3);
      await converge([one, two], {a: 1, offline: 1, meanwhile: 2, b: 3});
    },

    async 'both closed, and a new connector for the same document'() {
      const join = inRoom();
      const [one, two] = [join().set('a', 1).connect(), join().connect()];
      await converge([one, two], {a: 1});
      await Promise.all([one.connector.disconnect(), two.connector.disconnect()]);
      one.set('b', 2);
      two.set('c', 3);
      const [again, twice] = [join(), join()];
      again.doc = one.doc;
      twice.doc = two.doc;
      await converge([again.connect(), twice.connect()], {a: 1, b: 2, c: 3});
    },

    async 'ten clients at once'() {
      const join = inRoom();
      const clients = Array.from({length: 10}, () => join());
      const expected = {};
      for (const round of [1, 2, 3]) {
        clients.forEach((client, number) => {
          client.set(`${number}-${round}`, round).push(number).write(`${number}`);
          expected[`${number}-${round}`] = round;
          if (round === 1) client.connect();
        });
      }
      await converge(clients, expected);
      const {list, text} = clients[0].doc.toJSON();
      equal([list.length, text.length], [30, 30], 'length of the list and of the text');
    },

    async 'a large document'() {
      const join = inRoom();
      const one = join();
      // Random, or what is sent would be small.
      let large = '';
      while (large.length < 1 << 20) large += Math.random().toString(36).slice(2);
      one.doc.getMap('values').set('large', large);
      one.set('large', true).connect();
      const two = join().connect();
      await converge([one, two], {large: true});
      equal(two.doc.getMap('values').get('large'), large, 'value');
    },

    async 'rooms have nothing to do with each other'() {
      const [here, there] = [inRoom(), inRoom()];
      const one = here().set('a', 1).connect();
      const other = there().set('b', 2).connect();
      await converge([one, here().connect()], {a: 1});
      await converge([other, there().connect()], {b: 2});
      equal([one.map, other.map], [{a: 1}, {b: 2}], 'the rooms');
    },

    async 'a wrong token, and none'() {
      if (!server.token) return 'needs none';
      const join = inRoom();
      const one = join().set('a', 1).connect();
      await converge([one, join().connect()], {a: 1});
      for (const token of ['wrong', undefined]) {
        const stranger = join({token, maxRetries: 0}).set('b', 2);
        const closed = becomes(stranger, 'closed');
        stranger.connect();
        await closed;
        equal(stranger.map, {b: 2}, 'what a stranger has');
      }
      await converge([one, join().connect()], {a: 1});
    },

    async 'the end'() {
      await Promise.all(opened.map(({connector}) => connector.disconnect()));
    },
  };
}

/** Name of each step -> what it does, for each of the servers. */
export function roomSteps({servers}) {
  const named = Object.entries(servers).flatMap(([name, server]) =>
    Object.entries(stepsWith(server, name)).map(([step, run]) => [`${name}: ${step}`, run]),
  );
  return Object.fromEntries(named);
}
