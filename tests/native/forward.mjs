// Runs a packed file through the C interface of the WebAssembly module: node forward.mjs MODULE FILE IMAGES BATCH RUNS.
// Logits go to standard output, the times of the calls in ms to standard error, as JSON.
import fs from "node:fs";
import { WASI } from "node:wasi";

const [, , module, file, images, batch, runs] = process.argv;
const wasi = new WASI({ version: "preview1" });
const { instance } = await WebAssembly.instantiate(fs.readFileSync(module), wasi.getImportObject());
wasi.initialize(instance);
const api = instance.exports;

const copy = (bytes) => {
  const at = api.sparsemae_alloc(Math.max(bytes.length, 1));
  new Uint8Array(api.memory.buffer, at, bytes.length).set(bytes);
  return at;
};

const content = fs.readFileSync(file);
const model = api.sparsemae_open_memory(copy(content), content.length, 1, 0);
if (!model) {
  const at = api.sparsemae_error();
  const text = new Uint8Array(api.memory.buffer, at, 256);
  process.stderr.write(`${Buffer.from(text.subarray(0, text.indexOf(0)))}\n`);
  process.exit(1);
}
const outputs = new Uint32Array(api.memory.buffer, api.sparsemae_describe(model), 6)[4];
const input = copy(fs.readFileSync(images));
const size = +batch * outputs * 4;
const out = api.sparsemae_alloc(size);
const times = [];
for (let i = 0; i < +runs; ++i) {
  const start = performance.now();
  if (api.sparsemae_forward(model, input, +batch, out)) process.exit(1);
  times.push(performance.now() - start);
}
process.stdout.write(Buffer.from(api.memory.buffer, out, size));
process.stderr.write(`${JSON.stringify(times)}\n`);
