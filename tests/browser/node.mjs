// Runs the scenario in Node: its arguments come as JSON on standard input, its report leaves on
// standard output. Bundled by the test.
import {text} from 'node:stream/consumers';
import {runScenario} from './scenario.mjs';

const report = await runScenario(JSON.parse(await text(process.stdin)));
// A connection left open by a failed step would keep Node alive.
process.stdout.write(JSON.stringify(report), () => process.exit());
