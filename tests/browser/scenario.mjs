// A SQLRooms application and its server, through the published connector, unmodified.
//
// Runs alike in Node and in a browser: nothing here touches a file, a process or the page.

// The connector's own module: the package's index pulls in room-store, which needs a release of
// room-config that was never published.
import {createWebSocketDuckDbConnector} from '@sqlrooms/duckdb/dist/connectors/WebSocketDuckDbConnector.js';
import {Failed, check, within} from './checks.mjs';
import {roomSteps} from './room_steps.mjs';
import {steps} from './steps.mjs';

const STEP_DEADLINE_MS = 30_000;
const SCENARIO_DEADLINE_MS = 150_000;

/**
 * Runs what is asked for and reports each step; never throws.
 *
 * @param servers `{name: {wsUrl, token?}}`: servers with rooms, for their scenario; or else
 * @param wsUrl a server that needs no token and starts empty
 * @param files `{csv, parquet}`: paths on the server's disk, both holding the same thousand sales
 * @param locked `{wsUrl, token}` of a second server
 * @returns `{steps: [{name, ok, detail, ms}]}`, ready for JSON
 */
export async function runScenario({servers, ...duckdb}) {
  return {steps: await (servers ? run(roomSteps({servers}), {}) : runDuckDb(duckdb))};
}

async function runDuckDb({wsUrl, files, locked}) {
  const opened = [];
  const connect = (options = {}) => {
    const connector = createWebSocketDuckDbConnector({wsUrl, ...options});
    opened.push(connector);
    return connector;
  };
  const report = await run(steps, {wsUrl, files, locked, connect});
  await Promise.all(opened.map((connector) => connector.destroy()));
  return report;
}

/** The outcome of each step. `app` is what they share. */
async function run(steps, app) {
  const report = [];
  const end = performance.now() + SCENARIO_DEADLINE_MS;
  for (const [name, step] of Object.entries(steps)) {
    const start = performance.now();
    const outcome = {name, ok: false, detail: ''};
    try {
      check(start < end, 'not run: earlier steps took too long');
      const left = Math.min(STEP_DEADLINE_MS, end - start);
      outcome.detail = (await within(step(app), left)) ?? '';
      outcome.ok = true;
    } catch (error) {
      outcome.detail = error instanceof Failed ? error.message : String(error);
    }
    report.push({...outcome, ms: Math.round(performance.now() - start)});
  }
  return report;
}
