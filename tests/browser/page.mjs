// Runs the scenario in a browser: fetches its arguments from the page's own server and posts the
// report back to it. Bundled by the test.
import {runScenario} from './scenario.mjs';

function post(report) {
  return fetch('/report', {method: 'POST', body: JSON.stringify(report)});
}

// Node ends with an error at either of these; a page would go on in silence.
addEventListener('error', (event) => post({error: event.message}));
addEventListener('unhandledrejection', (event) => post({error: `unhandled: ${event.reason}`}));

const request = await (await fetch('/request')).json();
await post(await runScenario(request));
