// convolution.html: one image, one channel, one 3 x 3 kernel. All numbers come from conv2dForward and conv2dBackward.
"use strict";

const SIDE = 6;
const TAPS = 9;

const IMAGES = {
  "a corner": (i, j) => (i >= 2 && j >= 2 ? 9 : 1),
  "a bright pixel": (i, j) => (i === 2 && j === 3 ? 9 : 0),
  "a slope": (i, j) => i + j,
  "a cross": (i, j) => (i === 2 || j === 2 ? 8 : 0),
  "a chessboard": (i, j) => ((i + j) % 2 ? 0 : 5),
  empty: () => 0,
};

const KERNELS = {
  "vertical edges": [-1, 0, 1, -2, 0, 2, -1, 0, 1],
  "horizontal edges": [-1, -2, -1, 0, 0, 0, 1, 2, 1],
  "the same image": [0, 0, 0, 0, 1, 0, 0, 0, 0],
  "one to the right": [0, 0, 0, 1, 0, 0, 0, 0, 0],
  "sum of nine": [1, 1, 1, 1, 1, 1, 1, 1, 1],
  sharpen: [0, -1, 0, -1, 5, -1, 0, -1, 0],
  "one to nine": [1, 2, 3, 4, 5, 6, 7, 8, 9],
};

const GRADIENTS = {
  "one pixel": (i, j) => (i === 1 && j === 2 ? 1 : 0),
  "all ones": () => 1,
  "y itself (loss = ½ Σ y²)": (i, j, H, W, y) => y.data[i * W + j],
  empty: () => 0,
};

const state = {
  x: tensor([1, SIDE, SIDE, 1], new Array(SIDE * SIDE).fill(0)),
  weight: tensor([3, 3, 1, 1], KERNELS["vertical edges"]),
  bias: tensor([1], [0]),
  stride: 1,
  padding: "same",
  window: [2, 2], // the output pixel that one looks at
  dy: null, // of y's shape
  taps: TAPS, // taps of the backward pass that are done
};

// ---- the grids ------------------------------------------------------------------------------------------------------

const xGrid = new NumberGrid(byId("x"), {
  label: "x, the image with its padding",
  act: (i, j) => (chosen("tool") === "paint" ? paintImage(i, j) : moveWindow(i, j)),
  moveActs: () => chosen("tool") === "move",
});
const yGrid = new NumberGrid(byId("y"), {
  label: "y, the output",
  act: (i, j) => setWindow(i, j),
  moveActs: () => true,
});
const dyGrid = new NumberGrid(byId("dy"), { label: "dy, the gradient of the output", act: paintGradient });
const productGrid = new NumberGrid(byId("products"), { label: "the products at the window" });
const dweightGrid = new NumberGrid(byId("dweight"), { label: "dweight, the gradient of the kernel" });
const dxGrid = new NumberGrid(byId("dx"), { label: "dx, the gradient of the image" });

// ---- what acts ------------------------------------------------------------------------------------------------------

function paintImage(p, q) {
  const [i, j] = [p - geometry().before, q - geometry().before];
  if (i < 0 || j < 0 || i >= SIDE || j >= SIDE) return; // the padding stays zero
  state.x.data[i * SIDE + j] = Number(byId("brush").value);
  followY();
  draw();
}

/** Put the window's middle on pixel (p, q) of the padded image, as near as the stride allows. */
function moveWindow(p, q) {
  setWindow(Math.round((p - 1) / state.stride), Math.round((q - 1) / state.stride));
}

function setWindow(i, j) {
  const { out } = geometry();
  state.window = [i, j].map((place) => Math.min(Math.max(place, 0), out - 1));
  draw();
}

function paintGradient(i, j) {
  byId("gradient").value = "painted";
  state.dy.data[i * geometry().out + j] = Number(byId("gradient-brush").value);
  draw();
}

function chooseGradient() {
  const rule = GRADIENTS[byId("gradient").value];
  const { y } = forward();
  const [, H, W] = y.shape;
  if (rule) {
    state.dy = zeros(y.shape);
    state.dy.data.forEach((_, k) => (state.dy.data[k] = rule(Math.floor(k / W), k % W, H, W, y)));
  } else if (String(state.dy.shape) !== String(y.shape)) {
    state.dy = zeros(y.shape); // what was painted does not fit another stride or padding
  }
}

/** y has changed. If dy is to be y, so has dy. */
function followY() {
  if (byId("gradient").value.startsWith("y itself")) chooseGradient();
}

function readSettings() {
  state.stride = Number(chosen("stride"));
  state.padding = chosen("padding") === "same" ? "same" : Number(chosen("padding"));
  state.bias.data[0] = Number(byId("bias").value);
  document.querySelectorAll("#weight input").forEach((input, k) => (state.weight.data[k] = Number(input.value)));
  chooseGradient();
  setWindow(...state.window);
}

// ---- what is shown --------------------------------------------------------------------------------------------------

const forward = () => conv2dForward(state.x, state.weight, state.bias, state.stride, state.padding);

/** Rows of the output, zeros before the image, and rows of the padded image. */
function geometry() {
  const { out, before } = outputSize(SIDE, 3, state.stride, state.padding);
  const after = state.padding === "same" ? (out - 1) * state.stride + 3 - SIDE - before : before;
  return { out, before, side: before + SIDE + Math.max(after, 0) };
}

/** Pixel (p, q) of the padded image, as a value of x or dx; null in the padding. */
function padded(array, p, q) {
  const { before } = geometry();
  const [i, j] = [p - before, q - before];
  return i < 0 || j < 0 || i >= SIDE || j >= SIDE ? null : array.data[i * SIDE + j];
}

function draw() {
  const { out, before, side } = geometry();
  const { y, cache } = forward();
  const [row, column] = state.window.map((place) => state.stride * place); // of the window, in the padded image
  const inWindow = (p, q) => p >= row && p < row + 3 && q >= column && q < column + 3;

  const scaleX = largest(state.x.data);
  xGrid.show(side, side, (p, q) => {
    const value = padded(state.x, p, q);
    const classes = `${value === null ? "padding" : ""} ${inWindow(p, q) ? "in-window" : ""}`;
    const where = value === null ? "padding" : `row ${p - before}, column ${q - before}`;
    const text = format(value ?? 0);
    return { text, classes, background: shade(value, scaleX), label: `${where}: ${text}` };
  });

  const products = Array.from({ length: TAPS }, (_, k) => {
    const value = padded(state.x, row + Math.floor(k / 3), column + (k % 3)) ?? 0;
    return { value, weight: state.weight.data[k], product: value * state.weight.data[k] };
  });
  const scaleProducts = largest(products.map(({ product }) => product));
  productGrid.show(3, 3, (u, v) => {
    const { value, weight, product } = products[3 * u + v];
    const text = `${format(value)}·${format(weight)}\n= ${format(product)}`;
    return { text, classes: "wide", background: shade(product, scaleProducts) };
  });

  const scaleY = largest(y.data);
  yGrid.show(out, out, (i, j) => {
    const value = y.data[i * out + j];
    const here = i === state.window[0] && j === state.window[1];
    const label = `row ${i}, column ${j}: ${format(value)}`;
    return { text: format(value), classes: here ? "chosen" : "", background: shade(value, scaleY), label };
  });
  const [i, j] = state.window;
  const terms = products.filter(({ product }) => product !== 0).map(({ product }) => format(product));
  const bias = state.bias.data[0];
  byId("sum").textContent =
    `y[${i}, ${j}] = ${terms.join(" + ").replaceAll("+ −", "− ") || "0"}` +
    `${bias ? ` + bias ${format(bias)}` : ""} = ${format(y.data[i * out + j])}`;

  drawBackward(cache);
}

function drawBackward(cache) {
  const { out, before, side } = geometry();
  const { stride, taps, dy } = state;
  const { dweight, dbias } = conv2dBackward(dy, cache);
  // The taps that have not had their turn send nothing yet: as if their weights were zero.
  const soFar = map((w) => w, state.weight);
  soFar.data.fill(0, taps);
  const { dx } = conv2dBackward(dy, { ...cache, weight: soFar });
  const [u, v] = [Math.floor((taps - 1) / 3), (taps - 1) % 3]; // the tap whose turn it was
  const tapMeets = (p, q) =>
    taps > 0 &&
    (p - u) % stride === 0 &&
    (q - v) % stride === 0 &&
    p >= u &&
    q >= v &&
    p < u + stride * out &&
    q < v + stride * out;

  const scaleDy = largest(dy.data);
  dyGrid.show(out, out, (i, j) => {
    const value = dy.data[i * out + j];
    return { text: format(value), background: shade(value, scaleDy), label: `row ${i}, column ${j}: ${format(value)}` };
  });
  const scaleDweight = largest(dweight.data);
  dweightGrid.show(3, 3, (a, b) => {
    const k = 3 * a + b;
    const text = k < taps ? format(dweight.data[k]) : "·";
    const label = `tap ${a}, ${b}: ${k < taps ? text : "not yet"}`;
    return {
      text,
      label,
      classes: k === taps - 1 ? "chosen" : "",
      background: k < taps ? shade(dweight.data[k], scaleDweight) : "",
    };
  });
  const scaleDx = largest(dx.data);
  dxGrid.show(side, side, (p, q) => {
    const value = padded(dx, p, q);
    const classes = `${value === null ? "padding" : ""} ${tapMeets(p, q) ? "in-window" : ""}`;
    const text = value === null ? "" : format(value);
    const label = value === null ? "padding, dropped" : `row ${p - before}, column ${q - before}: ${text}`;
    return { text, label, classes, background: shade(value, scaleDx) };
  });

  byId("taps").value = taps;
  byId("step").disabled = taps === TAPS;
  byId("tap").textContent =
    taps === 0
      ? "No tap has had its turn: dx is zero, and dweight is not known."
      : `Tap (${u}, ${v}), weight ${format(state.weight.data[taps - 1])}: dweight[${u}, ${v}] = Σ x · dy = ` +
        `${meetings(u, v)} = ${format(dweight.data[taps - 1])}; ` +
        `and dx at the outlined pixels += dy · ${format(state.weight.data[taps - 1])}. ` +
        `dbias = Σ dy = ${format(dbias.data[0])}.`;
}

/** The terms of dweight at a tap that are not zero, the first few of them. */
function meetings(u, v) {
  const { out } = geometry();
  const terms = [];
  for (let i = 0; i < out; i++) {
    for (let j = 0; j < out; j++) {
      const value = padded(state.x, state.stride * i + u, state.stride * j + v) ?? 0;
      const d = state.dy.data[i * out + j];
      if (value && d) terms.push(`${format(value)}·${format(d)}`);
    }
  }
  return terms.length > 6 ? `${terms.slice(0, 6).join(" + ")} + … (${terms.length} terms)` : terms.join(" + ") || "0";
}

// ---- the controls ---------------------------------------------------------------------------------------------------

function fillSelect(select, names) {
  for (const name of names) select.append(new Option(name, name));
}

fillSelect(byId("image"), Object.keys(IMAGES));
fillSelect(byId("kernel"), [...Object.keys(KERNELS), "my own"]);
fillSelect(byId("gradient"), [...Object.keys(GRADIENTS), "painted"]);

for (let k = 0; k < TAPS; k++) {
  const input = Object.assign(document.createElement("input"), { type: "number", step: "any" });
  input.setAttribute("aria-label", `weight of tap ${Math.floor(k / 3)}, ${k % 3}`);
  input.addEventListener("input", () => {
    byId("kernel").value = "my own";
    readSettings();
  });
  byId("weight").append(input);
}

byId("image").addEventListener("change", () => {
  const rule = IMAGES[byId("image").value];
  state.x.data.forEach((_, k) => (state.x.data[k] = rule(Math.floor(k / SIDE), k % SIDE)));
  followY();
  draw();
});
byId("kernel").addEventListener("change", () => {
  const weights = KERNELS[byId("kernel").value] ?? state.weight.data;
  document.querySelectorAll("#weight input").forEach((input, k) => (input.value = weights[k]));
  readSettings();
});
byId("gradient").addEventListener("change", () => {
  chooseGradient();
  draw();
});
for (const input of document.querySelectorAll('input[name="stride"], input[name="padding"], #bias')) {
  input.addEventListener("input", readSettings);
}

let timer = null;
function setTaps(taps) {
  clearTimeout(timer);
  state.taps = taps;
  draw();
}
byId("taps").addEventListener("input", () => setTaps(Number(byId("taps").value)));
byId("first").addEventListener("click", () => setTaps(0));
byId("step").addEventListener("click", () => setTaps(Math.min(state.taps + 1, TAPS)));
byId("play").addEventListener("click", () => {
  if (wantsNoMotion()) return setTaps(TAPS);
  const next = () => {
    setTaps(state.taps + 1);
    if (state.taps < TAPS) timer = setTimeout(next, 700);
  };
  setTaps(0);
  timer = setTimeout(next, 300);
});

byId("kernel").dispatchEvent(new Event("change"));
byId("image").dispatchEvent(new Event("change"));
