// Runs a model through the C interface of the WebAssembly module: node forward.mjs MODULE MODEL IMAGES BATCH RUNS. Logits
// go to standard output, the best time of a call in ms to standard error. MODEL is written by blob.py.
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
const text = (string) => copy(Buffer.from(`${string}\0`));

const blob = fs.readFileSync(file);
const kSizeofShape = 80;
const builder = api.sparsemae_begin(copy(blob.subarray(0, kSizeofShape)));
for (let p = kSizeofShape; p < blob.length; ) {
  const [kind, rows, columns, n, m, type, ...bytes] = Array.from({ length: 10 }, (_, i) => blob.readUInt32LE(p + 4 * i));
  p += 40;
  const [name, codes, values, scale] = bytes.map((size) => {
    const part = blob.subarray(p, p + size);
    p += Math.ceil(size / 8) * 8;
    return part;
  });
  const label = text(name.toString());
  if (kind === 0) api.sparsemae_vector(builder, label, copy(values), values.length / 4);
  if (kind === 1) api.sparsemae_dense(builder, label, copy(values), rows, columns);
  if (kind === 2)
    api.sparsemae_sparse(
      builder, label, rows, columns, n, m, copy(codes), codes.length, type, copy(values), scale.length ? copy(scale) : 0, 1,
    );
}
const model = api.sparsemae_build(builder, 1, text(""));
const input = copy(fs.readFileSync(images));
const size = +batch * api.sparsemae_outputs(model) * 4;
const out = api.sparsemae_alloc(size);
let best = Infinity;
for (let i = 0; i < +runs; ++i) {
  const start = performance.now();
  api.sparsemae_forward(model, input, +batch, out);
  best = Math.min(best, performance.now() - start);
}
process.stdout.write(Buffer.from(api.memory.buffer, out, size));
process.stderr.write(`${best}\n`);
