// What the steps of the scenario check with.

/** What a step expected and did not get. */
export class Failed extends Error {}

/** JSON that also tells bigints; what `equal` compares. */
function text(value) {
  return JSON.stringify(value, (_, item) => (typeof item === 'bigint' ? `${item}n` : item));
}

export function equal(actual, expected, what) {
  if (text(actual) !== text(expected)) {
    throw new Failed(`${what}: expected ${text(expected)}, got ${text(actual)}`);
  }
}

export function check(condition, what) {
  if (!condition) throw new Failed(what);
}

/** An Arrow table as plain objects. */
export function rows(table) {
  return table.toArray().map((row) => ({...row.toJSON()}));
}

/** The cell (0,0): where an application reads a single value, or the count of changed rows. */
export function cell(table) {
  check(table.numRows > 0 && table.numCols > 0, 'the result has no cell (0,0)');
  return Number(table.getChildAt(0).get(0));
}

export function fieldNames(table) {
  return table.schema.fields.map((field) => field.name);
}

/** Milliseconds that an action takes. */
export async function elapsed(action) {
  const start = performance.now();
  await action();
  return performance.now() - start;
}

/** The error of a promise, or of a query handle, that has to fail. */
export function rejection(promise, what) {
  return promise.then(
    () => {
      throw new Failed(`${what} did not fail`);
    },
    (error) => error,
  );
}

/** What the promise brings, unless it takes too long. */
export function within(promise, ms) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Failed(`not finished in ${Math.round(ms)} ms`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
