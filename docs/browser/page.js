// One photograph, explained in the browser by what `xcam export --page` wrote beside this file.
import { prepared } from "./image.js";

const at = (id) => document.getElementById(id);
const TOP = 5;
let settings;
let ort;
let session;

function state(name, text = "") {
  document.body.dataset.state = name;
  at("message").textContent = text;
}

async function start() {
  settings = await (await fetch("page.json")).json();
  await load(settings.runtime);
  // More threads need headers that a plain file server does not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  session = await ort.InferenceSession.create(settings.file, { executionProviders: ["wasm"] });
  at("about").textContent = `${settings.model}, explained by ${settings.method} at its layer ${settings.layer}.`;
  state("ready");
  const asked = new URLSearchParams(location.search).get("photo");
  if (asked) await show(await (await answered(fetch(asked))).blob());
}

// ONNX Runtime: its code, then what that runs; the browser refuses a file that has another hash.
async function load({ url, files }) {
  const requests = Object.entries(files).map(([name, integrity]) =>
    answered(fetch(new URL(name, new URL(url, location.href)), { integrity })),
  );
  const [code, binary] = await Promise.all(requests.map(async (request) => (await request).arrayBuffer()));
  ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  ort.env.wasm.wasmBinary = binary;
}

async function answered(request) {
  const response = await request;
  if (!response.ok) throw new Error(`${response.url}: ${response.status} ${response.statusText}`);
  return response;
}

async function show(file) {
  state("running", "Looking …");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", premultiplyAlpha: "none" });
  } catch {
    throw new Error("This file is not a picture that the browser can read.");
  }
  const { pixels, input } = prepared(bitmap, settings);
  const size = settings.crop;
  const began = performance.now();
  const output = await session.run({ image: new ort.Tensor("float32", input, [1, 3, size, size]) });
  const took = performance.now() - began;
  draw(pixels, output.heatmap.data, size);
  list(softmax(output.logits.data));
  const peak = output.heatmap.data.reduce((best, value, i, all) => (value > all[best] ? i : best), 0);
  const cls = Number(output.class.data[0]);
  at("caption").textContent =
    `Explained: ${name(cls)} (class ${cls}). Hottest at ${peak % size}, ${Math.floor(peak / size)} of ` +
    `${size} × ${size} pixels. ${Math.round(took)} ms.`;
  at("result").hidden = false;
  Object.assign(document.body.dataset, { class: cls, peak });
  state("done");
}

const name = (cls) => settings.categories[cls] ?? `class ${cls}`;

function softmax(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b));
  const parts = Array.from(logits, (value) => Math.exp(value - top));
  const sum = parts.reduce((a, b) => a + b);
  return parts.map((value) => value / sum);
}

function list(probabilities) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  at("classes").replaceChildren(
    ...order.slice(0, TOP).map((cls) => {
      const [item, share, bar] = ["li", "span", "div"].map((tag) => document.createElement(tag));
      share.textContent = `${(100 * probabilities[cls]).toFixed(1)} %`;
      bar.className = "bar";
      bar.style.width = `${100 * probabilities[cls]}%`;
      item.append(name(cls), share, bar);
      return item;
    }),
  );
}

function draw(pixels, heatmap, size) {
  const colored = new Uint8ClampedArray(4 * size * size);
  heatmap.forEach((value, i) => {
    const color = settings.colors[Math.round(255 * value)];
    colored.set([color >> 16, (color >> 8) & 255, color & 255, 255 * value], 4 * i);
  });
  for (const [id, data] of [["picture", pixels], ["heat", colored]]) {
    const canvas = at(id);
    canvas.width = canvas.height = size;
    canvas.getContext("2d").putImageData(new ImageData(data, size, size), 0, 0);
  }
  fade();
}

function fade() {
  at("heat").style.opacity = at("opacity").value / 100;
}

function failed(error) {
  state("error", error.message ?? String(error));
}

const take = (file) => file && session && show(file).catch(failed);

at("file").addEventListener("change", (event) => take(event.target.files[0]));
at("opacity").addEventListener("input", fade);
at("drop").addEventListener("keydown", (event) => ["Enter", " "].includes(event.key) && at("file").click());
addEventListener("dragover", (event) => (event.preventDefault(), at("drop").classList.add("over")));
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
start().catch(failed);
