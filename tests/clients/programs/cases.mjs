// What the programs of clients in JavaScript share; see cases.py.
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

export const [URL_V1, MODEL] = process.argv.slice(2);
export const HELLO = "Hello, world.";
export const DEGREES = "It is 21 degrees in Paris.";
export const TOO_LONG = "word ".repeat(6000);

// The clients lie where npm has put them, not beside this file.
const from = join(process.env.CLIENTS_JS, "package.json");
const require = createRequire(from);

export async function load(name) {
  return import(pathToFileURL(require.resolve(name)).href);
}

export function version(name) {
  const path = join(dirname(from), "node_modules", name, "package.json");
  return JSON.parse(readFileSync(path)).version;
}

export function check(value, expected) {
  const [found, wanted] = [JSON.stringify(value), JSON.stringify(expected)];
  if (found !== wanted) throw new Error(`${found} is not ${wanted}`);
}

export async function run(version, cases) {
  const passed = [];
  const failed = {};
  for (const [name, one] of Object.entries(cases)) {
    try {
      await one();
      passed.push(name);
    } catch (error) {
      failed[name] = String(error.stack).slice(0, 3000);
    }
  }
  console.log(JSON.stringify({ version, passed, failed }));
  process.exit(0);
}
