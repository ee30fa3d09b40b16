// The model beside the page, by the C interface of the WebAssembly module (include/sparsemae.h). What is wrong with the
// model or a photograph is answered in words.
const BEST = 5;
let api, model, described;

const opened = open().then(
  (text) => postMessage({ model: text }),
  (error) => {
    postMessage({ model: `the model cannot be used: ${error.message}` });
    throw error;
  },
);
opened.catch(() => {});

async function bytes(file) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function open() {
  const relaxed = await bytes("sparsemae-relaxed.wasm");
  const code = WebAssembly.validate(relaxed) ? relaxed : await bytes("sparsemae.wasm");
  const module = await WebAssembly.compile(code);
  const imports = {};
  for (const { module: from, name } of WebAssembly.Module.imports(module)) (imports[from] ??= {})[name] = () => 52; // ENOSYS
  api = (await WebAssembly.instantiate(module, imports)).exports;
  api._initialize?.();
  const file = await bytes("model.safetensors");
  const at = put(file);
  model = api.sparsemae_open_memory(at, file.length, 1, 0);
  api.sparsemae_free(at);
  if (!model) throw new Error(text(api.sparsemae_error()));
  const d = new Uint32Array(api.memory.buffer, api.sparsemae_describe(model), 9);
  const [channels, height, width, classes, outputs] = d;
  const config = JSON.parse(text(d[8]));
  const names = config.class_names.length ? config.class_names : Array.from({ length: classes }, (_, i) => `${i}`);
  described = { channels, height, width, outputs, names, exif: config.preprocess.exif_transpose };
  if (!classes) throw new Error("it is an encoder, which has no classes");
  const license = config.license ? `, license ${config.license}` : "";
  return `${classes} classes, ${(file.length / 1e6).toFixed(1)} MB${license}`;
}

onmessage = async ({ data: { id, file } }) => {
  try {
    await opened;
    postMessage({ id, ...(await classified(file)) });
  } catch (error) {
    postMessage({ id, error: error.message || "cannot be classified" });
  }
};

async function classified(file) {
  const { data, width, height } = await pixels(file);
  const { channels, outputs, names } = described;
  const at = put(data);
  const input = memory(4 * channels * described.height * described.width);
  const out = memory(4 * outputs);
  try {
    const start = performance.now();
    if (api.sparsemae_prepare(model, at, width, height, 4, input)) throw new Error(text(api.sparsemae_error()));
    if (api.sparsemae_forward(model, input, 1, out)) throw new Error(text(api.sparsemae_error()));
    const ms = performance.now() - start;
    const logits = Array.from(new Float32Array(api.memory.buffer, out, outputs));
    if (!logits.every(Number.isFinite)) throw new Error("wanted finite logits, got NaN or infinite ones");
    const highest = Math.max(...logits);
    const exponentials = logits.map((logit) => Math.exp(logit - highest));
    const sum = exponentials.reduce((a, b) => a + b, 0);
    const order = logits.map((_, i) => i).sort((a, b) => logits[b] - logits[a]);
    const best = order.slice(0, BEST).map((i) => ({ label: names[i], probability: exponentials[i] / sum }));
    return { best, logits, ms };
  } finally {
    for (const one of [at, input, out]) api.sparsemae_free(one);
  }
}

// RGBA as it is in the file: no conversion of colors, and alpha not multiplied in, which a 2D canvas would do.
async function pixels(file) {
  const content = described.exif ? file : await upright(file);
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let image;
  try {
    image = await createImageBitmap(content, options);
  } catch {
    throw new Error("not an image that this browser can read");
  }
  const { width, height } = image;
  const opaque = /jpe?g|bmp/.test(file.type);
  const data = (!opaque && byWebGl(image)) || byCanvas(image);
  image.close();
  return { data, width, height };
}

function byCanvas(image) {
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height).data;
}

function byWebGl(image) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  if (!gl || Math.max(image.width, image.height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const data = new Uint8Array(4 * image.width * image.height);
  gl.readPixels(0, 0, image.width, image.height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  const failed = gl.getError() || gl.isContextLost();
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return failed ? null : data;
}

// A JPEG without its EXIF orientation, for models that were trained without it.
async function upright(file) {
  const data = new Uint8Array(await file.arrayBuffer());
  if (data[0] !== 0xff || data[1] !== 0xd8) return file;
  const parts = [data.subarray(0, 2)];
  let at = 2;
  while (at + 4 <= data.length && data[at] === 0xff && data[at + 1] >= 0xe0 && data[at + 1] <= 0xef) {
    const end = at + 2 + (data[at + 2] << 8) + data[at + 3];
    if (data[at + 1] !== 0xe1) parts.push(data.subarray(at, end));
    at = end;
  }
  return new Blob([...parts, data.subarray(at)], { type: file.type });
}

function memory(size) {
  const at = api.sparsemae_alloc(size);
  if (!at) throw new Error("too large for this device's memory");
  return at;
}

function put(data) {
  const at = memory(Math.max(data.length, 1));
  new Uint8Array(api.memory.buffer, at, data.length).set(data);
  return at;
}

function text(at) {
  const all = new Uint8Array(api.memory.buffer, at);
  return new TextDecoder().decode(all.slice(0, all.indexOf(0)));
}
