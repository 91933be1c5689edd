// The steps of the scenario: what an application does, and what it must see.

import {tableFromArrays, tableToIPC} from 'apache-arrow';
import {cell, check, elapsed, equal, fieldNames, rejection, rows} from './checks.mjs';

const ANSWERS_QUICKLY_MS = 5_000;
const FREE_AGAIN_MS = 15_000;

// 10^12 pairs: minutes on any machine, so only a cancel ends it in time.
const HEAVY = 'select sum(a.range * b.range) from range(1000000) a cross join range(1000000) b';
// Twice the workers of the server, so half of them wait in its queue.
const HEAVY_COUNT = 8;
// Long enough to feel the heavy queries beside it, short enough to be asked again and again.
const PROBE = 'select sum(range % 7)::bigint as s from range(30000000)';

// The same thousand rows come from the CSV and from the Parquet file.
async function checkSales(app, table) {
  const summary = await app.connector.query(`
    select count(*)::integer as n, count(note)::integer as notes, sum(amount)::double as amount,
      count(distinct city)::integer as cities, min(day)::varchar as first, max(day)::varchar as last
    from ${table}`);
  const [first, last] = ['2024-01-01', '2024-12-31'];
  equal(rows(summary), [{n: 1000, notes: 900, amount: 624375, cities: 3, first, last}], table);
  const row = await app.connector.query(`select city, note from ${table} where id = 7`);
  equal(rows(row), [{city: 'New York', note: 'note "7", ok'}], `${table}, row 7`);
}

/**
 * Name of each step -> what it does, in order. A step throws when it fails and may return a detail.
 *
 * `app` is what the steps share: what `runScenario` was given, `connect(options)`, and, from the
 * first step on, the two clients `connector` and `second`.
 */
export const steps = {
  async 'initialise, with an initialization query'(app) {
    const seen = [];
    app.connector = app.connect({
      initializationQuery: 'create table boot as select 42 as answer',
      onConnectionStatusChange: (status) => seen.push(status),
    });
    equal(app.connector.connectionStatus, 'idle', 'status before');
    await app.connector.initialize();
    equal(app.connector.connectionStatus, 'connected', 'status');
    equal(seen, ['connecting', 'connected'], 'statuses');
    equal(cell(await app.connector.query('select answer from boot')), 42, 'answer');
    app.second = app.connect();
    await app.second.initialize();
    equal(cell(await app.second.query('select answer from boot')), 42, 'answer to another client');
  },

  async 'loadFile: CSV'(app) {
    await app.connector.loadFile(app.files.csv, 'sales_csv');
    await checkSales(app, 'sales_csv');
  },

  async 'loadFile: Parquet'(app) {
    await app.connector.loadFile(app.files.parquet, 'sales_parquet');
    await checkSales(app, 'sales_parquet');
  },

  async 'loadFile: into a new schema, replaced'(app) {
    const options = {method: 'read_csv', schema: 'raw', replace: true, all_varchar: true};
    await app.connector.loadFile(app.files.csv, 'sales', {...options, where: 'id::integer < 5'});
    await app.connector.loadFile(app.files.csv, 'sales', {...options, select: ['id', 'city']});
    const table = await app.connector.query('select * from raw.sales order by id::integer limit 2');
    equal(rows(table), [{id: '0', city: 'Zürich'}, {id: '1', city: 'New York'}], 'rows');
    equal(cell(await app.connector.query('select count(*) from raw.sales')), 1000, 'count');
  },

  async 'files read by SQL'(app) {
    const {csv, parquet} = app.files;
    const created = await app.connector.query(
      `create or replace table sales_sql as select * from read_csv('${csv}')`,
    );
    equal(cell(created), 1000, 'Count of CREATE TABLE AS');
    await checkSales(app, 'sales_sql');
    await checkSales(app, `read_parquet('${parquet}')`);
    const joined = await app.connector.query(`
      select count(*) from sales_sql join '${parquet}' p using (id) where sales_sql.day = p.day`);
    equal(cell(joined), 1000, 'rows of the join');
  },

  async 'query: an Arrow table'(app) {
    const table = await app.connector.query(`
      select * from (values
        (1, 9007199254740993::bigint, 0.1::double, 'Zoë "Z" O''Neil 🦆', date '2024-02-29',
          timestamp '2024-02-29 12:34:56.789', true, [1, 2]),
        (-2147483648, null, null, '', null, null, false, null)
      ) t(i, big, x, s, d, ts, flag, list) order by i desc`);
    equal(fieldNames(table), ['i', 'big', 'x', 's', 'd', 'ts', 'flag', 'list'], 'fields');
    equal(table.numRows, 2, 'rows');
    const column = (name) => [0, 1].map((row) => table.getChild(name).get(row));
    const day = Date.UTC(2024, 1, 29);
    equal(column('i'), [1, -2147483648], 'i');
    equal(column('big'), [9007199254740993n, null], 'big');
    equal(column('x'), [0.1, null], 'x');
    equal(column('s'), ['Zoë "Z" O\'Neil 🦆', ''], 's');
    equal(column('d').map((value) => value && Number(value)), [day, null], 'd');
    const moment = day + ((12 * 60 + 34) * 60 + 56) * 1000 + 789;
    equal(column('ts').map((value) => value && Number(value)), [moment, null], 'ts');
    equal(column('flag'), [true, false], 'flag');
    equal(column('list').map((value) => value && Array.from(value)), [[1, 2], null], 'list');
  },

  async 'queryJson: rows'(app) {
    const accessor = await app.connector.queryJson(`
      select range::integer as n, 'row ' || range as label, range * 10000000000 as big,
        (range + 0.125)::decimal(10, 3) as price, {'x': range::integer, 'y': null} as point,
        if(range = 1, null, [range::integer]) as list
      from range(3) order by range`);
    const expected = [0, 1, 2].map((n) => ({
      n,
      label: `row ${n}`,
      big: n * 10_000_000_000,
      price: `${n}.125`,
      point: {x: n, y: null},
      list: n === 1 ? null : [n],
    }));
    equal(accessor.length, 3, 'length');
    equal(accessor.toArray(), expected, 'rows');
    equal([...accessor], expected, 'iterated');
  },

  async 'execute: statements without a result'(app) {
    for (const sql of [
      'create table items(id integer primary key, name varchar)',
      'create view named as select * from items where name is not null',
      "set timezone = 'UTC'",
    ]) {
      const table = await app.connector.execute(sql);
      equal([table.numRows, table.numCols], [0, 0], sql);
    }
  },

  async 'execute: the count of changed rows'(app) {
    const changed = async (sql) => cell(await app.connector.execute(sql));
    equal(await changed("insert into items values (1, 'a'), (2, null), (3, 'c')"), 3, 'insert');
    equal(await changed("update items set name = 'b' where id = 2"), 1, 'update');
    equal(await changed('delete from items where id > 2'), 1, 'delete');
    equal(await changed('delete from items where id > 2'), 0, 'delete of nothing');
    const table = await app.connector.query('select * from named order by id');
    equal(rows(table), [{id: 1, name: 'a'}, {id: 2, name: 'b'}], 'rows');
  },

  async 'several statements: the last result counts'(app) {
    const table = await app.connector.query(
      "create table two(v varchar); insert into two values ('x;y'); select v from two; -- end",
    );
    equal(rows(table), [{v: 'x;y'}], 'rows');
  },

  async 'an empty result'(app) {
    const table = await app.connector.query('select id, name from items where id > 99');
    equal(table.numRows, 0, 'rows');
    // It takes an empty batch: the connector forgets the schema of a stream without any.
    equal(fieldNames(table), ['id', 'name'], 'fields');
    equal((await app.connector.queryJson('select 1 as x where false')).toArray(), [], 'JSON rows');
  },

  async 'loadArrow: a table'(app) {
    const table = tableFromArrays({
      n: Int32Array.from({length: 1000}, (_, i) => i),
      label: Array.from({length: 1000}, (_, i) => (i % 10 ? `größe ${i}` : null)),
    });
    await app.connector.loadArrow(table, 'up');
    const sums = await app.connector.query(`
      select count(*)::integer as n, sum(n)::integer as s, count(label)::integer as labels
      from up`);
    equal(rows(sums), [{n: 1000, s: 499500, labels: 900}], 'sums');
    const row = await app.connector.query('select label from up where n = 7');
    equal(rows(row), [{label: 'größe 7'}], 'row');
  },

  async 'loadArrow: bytes replace the table'(app) {
    const bytes = tableToIPC(tableFromArrays({other: Float64Array.of(1.5, 2.5)}), 'stream');
    check(bytes instanceof Uint8Array, 'tableToIPC makes bytes');
    await app.connector.loadArrow(bytes, 'up');
    const table = await app.connector.query('select * from up order by other');
    equal(rows(table), [{other: 1.5}, {other: 2.5}], 'rows');
  },

  async 'loadArrow: bytes that are no Arrow stream'(app) {
    const upload = app.connector.loadArrow(new Uint8Array(100).fill(7), 'up');
    const error = await rejection(upload, 'the upload');
    check(error.message.length > 0, 'the error says something');
    equal(cell(await app.connector.query('select count(*) from up')), 2, 'rows of the old table');
  },

  async 'loadObjects'(app) {
    const objects = Array.from({length: 1000}, (_, i) => ({
      id: i,
      name: i % 4 ? `it's "${i}" – żółw; 🐢 --` : null,
      ratio: i / 8,
      even: i % 2 === 0,
    }));
    await app.connector.loadObjects(objects, 'objects');
    // Number literals are decimals to DuckDB.
    const table = await app.connector.query(
      'select * replace (ratio::double as ratio) from objects order by id',
    );
    equal(rows(table), objects, 'rows');
    const sums = await app.connector.query(`
      select count(*)::integer as n, count(name)::integer as names, sum(ratio)::double as ratio,
        count(*) filter (even)::integer as even from objects`);
    equal(rows(sums), [{n: 1000, names: 750, ratio: 62437.5, even: 500}], 'sums');
  },

  async "errors carry DuckDB's text"(app) {
    const message = async (sql) => (await rejection(app.connector.query(sql), sql)).message;
    const parser = await message('selec 1');
    check(parser.includes('Parser Error'), `of bad SQL: ${parser}`);
    check(parser.includes('selec'), `the bad word is named: ${parser}`);
    const catalog = await message('from missing');
    const told = /Catalog Error.*missing.*does not exist/s.test(catalog);
    check(told, `of a missing table: ${catalog}`);
    const conversion = await message("select 'abc'::integer");
    check(conversion.includes('Conversion Error'), `of a bad value: ${conversion}`);
    equal(cell(await app.connector.query('select 1')), 1, 'a query afterwards');
  },

  async 'a result that fails midway'(app) {
    // The reply may have begun by then, so the text may be lost. The failure may not: the rows so
    // far must never pass for the result.
    const sql = "select if(range = 900000, error('too far'), range) as n from range(1000000)";
    const error = await rejection(app.connector.query(sql), sql);
    equal(cell(await app.connector.query('select 1')), 1, 'a query afterwards');
    return error.message;
  },

  async 'cancel ends a heavy query'(app) {
    const handle = app.connector.query(HEAVY);
    const failed = rejection(handle, 'the heavy query');
    const light = await elapsed(() => app.connector.query('select 1'));
    check(light < ANSWERS_QUICKLY_MS, `a light query beside it took ${light} ms`);
    const ended = await elapsed(async () => {
      await handle.cancel();
      equal((await failed).name, 'AbortError', 'error');
    });
    check(ended < 1000, `cancel took ${ended} ms`);
    const next = await elapsed(() => app.connector.query('select count(*) from range(1000)'));
    check(next < ANSWERS_QUICKLY_MS, `the next query took ${next} ms`);
    return `cancelled in ${Math.round(ended)} ms, next query in ${Math.round(next)} ms`;
  },

  async 'cancelled queries leave the server free'(app) {
    const probe = () => elapsed(() => app.second.query(PROBE));
    await probe();
    const idle = await probe();
    const handles = Array.from({length: HEAVY_COUNT}, () => app.connector.query(HEAVY));
    const failures = handles.map((handle) => rejection(handle, 'a heavy query'));
    // Lets the connector send them: one that is cancelled before it is sent never leaves.
    await new Promise((resolve) => setTimeout(resolve, 0));
    for (const handle of handles) await handle.cancel();
    for (const error of await Promise.all(failures)) equal(error.name, 'AbortError', 'error');
    const answers = await Promise.all(
      handles.map((_, i) => app.second.query(`select ${i}::integer as i`)),
    );
    equal(answers.map(cell), handles.map((_, i) => i), 'answers to the second client');
    // Heavy queries that still ran would make each probe several times slower, for minutes.
    const limit = performance.now() + FREE_AGAIN_MS;
    let last;
    do {
      last = await probe();
    } while (last > 2 * idle + 100 && performance.now() < limit);
    const found = `a probe takes ${Math.round(last)} ms, ${Math.round(idle)} ms when idle`;
    check(last <= 2 * idle + 100, found);
    return found;
  },

  async 'an abort signal cancels'(app) {
    const controller = new AbortController();
    const handle = app.connector.query(HEAVY, {signal: controller.signal});
    const failed = rejection(handle, 'the heavy query');
    await app.connector.query('select 1');
    controller.abort();
    equal((await failed).name, 'AbortError', 'error');
    equal(cell(await app.connector.query('select 2')), 2, 'the next answer');
  },

  async 'fifty queries at once'(app) {
    const tables = await Promise.all(
      Array.from({length: 50}, (_, i) =>
        app.connector.query(
          `select ${i}::integer as i, coalesce(sum(range), 0)::bigint as s from range(${i * 1000})`,
        ),
      ),
    );
    tables.forEach((table, i) => {
      const n = i * 1000;
      equal(rows(table), [{i, s: BigInt((n * (n - 1)) / 2)}], `query ${i}`);
    });
  },

  async 'a million rows'(app) {
    const count = 1_000_000;
    const table = await app.connector.query(
      `select range as n, range / 2 as half, 'row ' || range as label from range(${count})`,
    );
    equal(table.numRows, count, 'rows');
    let sum = 0n;
    for (const n of table.getChild('n').toArray()) sum += n;
    equal(sum, (BigInt(count) * BigInt(count - 1)) / 2n, 'sum of n');
    let half = 0;
    for (const value of table.getChild('half').toArray()) half += value;
    equal(half, (count * (count - 1)) / 4, 'sum of half');
    equal(table.getChild('label').get(count - 1), `row ${count - 1}`, 'last label');
  },

  async 'ATTACH in one message, use in the next'(app) {
    const {connector} = app;
    equal((await connector.execute("attach ':memory:' as other")).numRows, 0, 'rows of ATTACH');
    const created = await connector.query('create table other.t as select range n from range(9)');
    equal(cell(created), 9, 'Count');
    equal(cell(await connector.query('select sum(n)::integer from other.main.t')), 36, 'sum');
    equal((await connector.execute('detach other')).numRows, 0, 'rows of DETACH');
    const error = await rejection(connector.query('select * from other.t'), 'a query after DETACH');
    check(/other|does not exist/.test(error.message), `error after DETACH: ${error.message}`);
  },

  async 'notifications arrive once'(app) {
    const seen = [];
    let finish;
    const finished = new Promise((resolve) => {
      finish = resolve;
    });
    const listener = app.connect({
      subscribeChannels: ['news'],
      onNotification: (payload) => {
        seen.push(payload);
        if (payload.last) finish();
      },
    });
    await listener.initialize();
    await listener.query('select 1');
    // The connector only listens, so a plain socket speaks.
    const speaker = new WebSocket(app.wsUrl);
    speaker.onopen = () => {
      for (const payload of [{n: 1}, {n: 2, last: true}]) {
        speaker.send(JSON.stringify({type: 'notify', channel: 'news', payload}));
      }
    };
    await finished;
    speaker.close();
    await listener.destroy();
    equal(seen, [{n: 1}, {n: 2, last: true}], 'payloads');
  },

  async 'the right token'(app) {
    const {wsUrl, token} = app.locked;
    const connector = app.connect({wsUrl, authToken: token, initializationQuery: 'select 1'});
    await connector.initialize();
    equal(connector.connectionStatus, 'connected', 'status');
    equal(cell(await connector.query('select 42')), 42, 'answer');
    const byUrl = app.connect({wsUrl: `${wsUrl}/?token=${encodeURIComponent(token)}`});
    await byUrl.initialize();
    equal(cell(await byUrl.query('select 43')), 43, 'answer with the token in the URL');
    const open = app.connect({authToken: 'a token that nobody asked for'});
    await open.initialize();
    equal(cell(await open.query('select 44')), 44, 'answer of the server that needs none');
  },

  async 'a wrong token'(app) {
    const connector = app.connect({wsUrl: app.locked.wsUrl, authToken: 'wrong'});
    const error = await rejection(connector.initialize(), 'initialize');
    check(/unauthorized/i.test(error.message), `error: ${error.message}`);
    equal(connector.connectionStatus, 'disconnected', 'status');
  },

  async 'no token'(app) {
    const connector = app.connect({wsUrl: app.locked.wsUrl});
    const failure = async () => {
      await connector.initialize();
      await connector.query('select 1');
    };
    const error = await rejection(failure(), 'a query');
    check(/unauthorized/i.test(error.message), `error: ${error.message}`);
  },

  async 'destroy'(app) {
    await app.connector.destroy();
    equal(app.connector.connectionStatus, 'idle', 'status');
    equal(cell(await app.second.query('select answer from boot')), 42, 'answer to the other one');
  },
};
