// The page: hands photographs to the worker one after the other, and shows what it finds.
const results = document.getElementById("results");
const status = document.getElementById("model");
const drop = document.getElementById("drop");
const input = document.getElementById("files");
const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let next = 0;

worker.onmessage = ({ data }) => {
  if (data.model) status.textContent = data.model;
  if (data.id === undefined) return;
  const { item, file } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) {
    item.replaceChildren(element("p", { className: "error", textContent: `${file.name}: ${data.error}` }));
  } else {
    const image = element("img", { alt: "", src: URL.createObjectURL(file) });
    image.onload = () => URL.revokeObjectURL(image.src);
    const rows = data.best.flatMap(({ label, probability }) => {
      const text = `${label} ${(100 * probability).toFixed(1)} %`;
      return [element("div", { textContent: text }), element("meter", { value: probability, ariaLabel: text })];
    });
    const bars = element("div", {});
    bars.append(element("b", { textContent: file.name }), ...rows);
    item.replaceChildren(image, bars, element("small", { textContent: `${data.ms.toFixed(0)} ms` }));
  }
  document.dispatchEvent(new CustomEvent("classified", { detail: { name: file.name, ...data } }));
};
worker.onerror = () => (status.textContent = "this browser cannot run the model");

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function classify(files) {
  for (const file of files) {
    const item = element("li", { textContent: `${file.name} ...` });
    results.prepend(item);
    waiting.set(next, { item, file });
    worker.postMessage({ id: next++, file });
  }
}

input.onchange = () => {
  classify(input.files);
  input.value = "";
};
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") classify(event.dataTransfer.files);
  });
}
