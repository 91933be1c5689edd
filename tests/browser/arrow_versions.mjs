// Decodes every `*.arrow` stream of a directory with every release of apache-arrow in use; prints
//   {file: {version: {rows, fields, values} | {error}}}
// where values are the first rows and the last one, each cell as a string.
// usage: node arrow_versions.mjs DIRECTORY
import {readFileSync, readdirSync} from 'node:fs';
import {join} from 'node:path';
import * as arrow17 from 'arrow17';
import * as arrow18 from 'arrow18';
import * as arrow19 from 'arrow19';
import * as arrow20 from 'arrow20';
import * as arrow21 from 'arrow21';

const VERSIONS = {17: arrow17, 18: arrow18, 19: arrow19, 20: arrow20, 21: arrow21};
const FIRST_ROWS = 3;

// Arrow keeps a decimal as little-endian 32-bit words in two's complement, without its point.
function decimalText(words, scale) {
  const bits = words.length * 32;
  const unsigned = words.reduce((sum, word, i) => sum | (BigInt(word) << BigInt(i * 32)), 0n);
  const value = BigInt.asIntN(bits, unsigned);
  const digits = String(value < 0n ? -value : value).padStart(scale + 1, '0');
  const point = digits.length - scale;
  const text = scale ? `${digits.slice(0, point)}.${digits.slice(point)}` : digits;
  return value < 0n ? `-${text}` : text;
}

// One spelling for all releases: dates and timestamps are milliseconds, bytes are hex.
function text(arrow, type, value) {
  const {DataType} = arrow;
  if (value === null || value === undefined) return 'null';
  if (DataType.isDictionary(type)) return text(arrow, type.dictionary, value);
  if (DataType.isDecimal(type)) return decimalText(Array.from(value), type.scale);
  if (DataType.isList(type) || DataType.isFixedSizeList(type)) {
    return `[${Array.from(value, (item) => text(arrow, type.valueType, item)).join(', ')}]`;
  }
  if (DataType.isStruct(type)) {
    const members = type.children.map(
      (child) => `${child.name}: ${text(arrow, child.type, value[child.name])}`,
    );
    return `{${members.join(', ')}}`;
  }
  if (DataType.isMap(type)) {
    const entries = Array.from(
      value,
      ([key, item]) => `${key}=${text(arrow, type.valueType, item)}`,
    );
    return `{${entries.join(', ')}}`;
  }
  if (value instanceof Date) return String(value.getTime());
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex');
  return String(value);
}

function decode(arrow, bytes) {
  const table = arrow.tableFromIPC(bytes);
  const shown = Array.from({length: Math.min(FIRST_ROWS, table.numRows)}, (_, row) => row);
  if (table.numRows > FIRST_ROWS) shown.push(table.numRows - 1);
  const {fields} = table.schema;
  return {
    rows: table.numRows,
    fields: fields.map((field) => field.name),
    values: shown.map((row) =>
      fields.map((field, i) => text(arrow, field.type, table.getChildAt(i)?.get(row))),
    ),
  };
}

function attempt(arrow, bytes) {
  try {
    return decode(arrow, bytes);
  } catch (error) {
    return {error: String(error)};
  }
}

const directory = process.argv[2];
const report = {};
for (const file of readdirSync(directory).filter((name) => name.endsWith('.arrow'))) {
  const bytes = readFileSync(join(directory, file));
  report[file] = Object.fromEntries(
    Object.entries(VERSIONS).map(([version, arrow]) => [version, attempt(arrow, bytes)]),
  );
}
console.log(JSON.stringify(report));
