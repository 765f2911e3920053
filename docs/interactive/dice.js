// dice.html: a target and the logits of a prediction, painted; the losses of ops.js and their gradients.
"use strict";

const SIDE = 16;
const PIXELS = SIDE * SIDE;
const ZOOM = 14; // points of the canvas a pixel
const LIMIT = 9; // logits are kept in [-9, 9]: sigmoid(-9) = 0.0001 is as sure a "no" as one needs

const disk = (row, column, radius) => (i, j) => Math.hypot(i - row, j - column) <= radius;
const sure = (mask) => (i, j) => (mask(i, j) ? 0.95 : 0.02);
const nothing = () => false;

/** Each preset: for each of the two images [target, probability], functions of the pixel; and how many images. */
const PRESETS = {
  "a near miss": { first: [disk(7, 6, 4), sure(disk(8, 9, 4))] },
  "right, but unsure": { first: [disk(7, 7, 4), (i, j) => (disk(7, 7, 4)(i, j) ? 0.6 : 0.4)] },
  "a small one, missed": { first: [disk(4, 11, 1.5), () => 0.05] },
  "nothing there, unsure": { first: [nothing, () => 0.5] },
  "nothing there, false alarm": { first: [nothing, sure(disk(9, 6, 2))] },
  "nothing there, nothing found": { first: [nothing, () => 0] },
  "one large, one empty": {
    first: [disk(7, 7, 6), sure(disk(8, 8, 5))],
    second: [nothing, sure(disk(4, 4, 1.5))],
  },
};

const state = {
  images: 1,
  target: null, // (images, SIDE, SIDE, 1): 0 or 1
  logits: null,
  smooth: 1,
  over: "batch",
  cursor: [0, 0, 0], // image, row, column that the line of text is about
};

// ---- the losses -----------------------------------------------------------------------------------------------------

/** All that the page shows, from the state. */
function compute() {
  const { target, logits, smooth, over } = state;
  const probabilities = map(sigmoid, logits);
  const dice = diceLossForward(probabilities, target, smooth, over);
  const bce = bceWithLogitsForward(logits, target);
  const both = segmentationLossForward(logits, target, { smooth, over });
  const diceAlone = segmentationLossForward(logits, target, { bceWeight: 0, smooth, over });
  return {
    probabilities,
    losses: { diceP: dice.loss, dice: diceAlone.loss, bce: bce.loss, both: both.loss },
    gradients: {
      diceP: diceLossBackward(dice.cache),
      dice: segmentationLossBackward(diceAlone.cache),
      bce: bceWithLogitsBackward(bce.cache),
      both: segmentationLossBackward(both.cache),
    },
    scores: hardScores(probabilities, target),
  };
}

/** A gradient as people write it: those of a mean over many pixels are small. */
function formatGradient(d) {
  return d !== 0 && Math.abs(d) < 0.01 ? d.toExponential(1).replaceAll("-", "−") : format(d, 4);
}

/** The largest absolute value of an array. */
const largestOf = (array) => array.data.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

// ---- what acts ------------------------------------------------------------------------------------------------------

const logit = (p) => Math.min(Math.max(Math.log(p / (1 - p)), -LIMIT), LIMIT);

/** Make arrays for this many images, keeping what was painted. */
function setImages(count) {
  const before = state;
  state.images = count;
  const [target, logits] = [zeros([count, SIDE, SIDE, 1]), zeros([count, SIDE, SIDE, 1])];
  logits.data.fill(-LIMIT);
  if (before.target) {
    const kept = Math.min(target.data.length, before.target.data.length);
    target.data.set(before.target.data.subarray(0, kept));
    logits.data.set(before.logits.data.subarray(0, kept));
  }
  Object.assign(state, { target, logits });
  state.cursor[0] = Math.min(state.cursor[0], count - 1);
  document.querySelector(`input[name="images"][value="${count}"]`).checked = true;
  buildRows();
}

function choosePreset() {
  const preset = PRESETS[byId("preset").value];
  setImages(preset.second ? 2 : 1);
  [preset.first, preset.second].slice(0, state.images).forEach(([target, probability], n) => {
    for (let k = 0; k < PIXELS; k++) {
      const [i, j] = [Math.floor(k / SIDE), k % SIDE];
      state.target.data[n * PIXELS + k] = target(i, j) ? 1 : 0;
      state.logits.data[n * PIXELS + k] = logit(probability(i, j));
    }
  });
  state.cursor = [0, 7, 7];
  draw();
}

/** Call change(k, d) for the pixels of image n at most `radius` from (i, j), d being their distance. */
function forEachNear(n, i, j, radius, change) {
  for (let p = Math.ceil(i - radius); p <= i + radius; p++) {
    for (let q = Math.ceil(j - radius); q <= j + radius; q++) {
      const d = Math.hypot(p - i, q - j);
      if (d <= radius && p >= 0 && q >= 0 && p < SIDE && q < SIDE) change(n * PIXELS + p * SIDE + q, d);
    }
  }
}

let paintsOne = true; // a stroke on the target that begins on a 1 erases
function paintTarget(n, i, j, begins) {
  if (begins) paintsOne = state.target.data[n * PIXELS + i * SIDE + j] === 0;
  forEachNear(n, i, j, 1, (k) => (state.target.data[k] = paintsOne ? 1 : 0));
}

function paintPrediction(n, i, j) {
  const wanted = Number(byId("brush").value);
  const soft = byId("soft").checked;
  forEachNear(n, i, j, soft ? 3 : 1, (k, d) => {
    const share = soft ? Math.exp(-(d * d) / 2) : 1;
    const p = sigmoid(state.logits.data[k]);
    state.logits.data[k] = logit(p + share * (wanted - p));
  });
}

function stepDownhill(count) {
  const name = byId("descend").value;
  for (let step = 0; step < count; step++) {
    const gradient = compute().gradients[name];
    const rate = gradient.data.length;
    state.logits = map((z, d) => Math.min(Math.max(z - rate * d, -LIMIT), LIMIT), state.logits, gradient);
  }
  draw();
}

// ---- what is shown --------------------------------------------------------------------------------------------------

let rows = []; // for each image its canvases: target, prediction, the gradients of Dice, cross entropy and their sum

function buildRows() {
  byId("rows").replaceChildren();
  rows = Array.from({ length: state.images }, (_, n) => {
    const row = byId("rows").appendChild(document.createElement("div"));
    row.className = "side-by-side";
    const canvas = (name, caption, hint = "Arrows move the cursor.") => {
      const figure = row.appendChild(document.createElement("figure"));
      const title = state.images > 1 ? `image ${n + 1}: ${caption}` : caption;
      figure.appendChild(document.createElement("figcaption")).textContent = title;
      const element = figure.appendChild(document.createElement("canvas"));
      element.className = "mask";
      element.dataset.map = name;
      element.setAttribute("role", "application");
      element.setAttribute("aria-label", `${title}, ${SIDE} by ${SIDE} pixels. ${hint}`);
      element.setAttribute("aria-describedby", "pixel");
      return element;
    };
    const target = canvas("target", "target", "Arrows move the cursor, space paints or erases.");
    const prediction = canvas("prediction", "prediction", "Arrows move the cursor, space paints.");
    const gradients = [
      canvas("dice", "Dice says"),
      canvas("bce", "cross entropy says"),
      canvas("both", "their sum says"),
    ];
    const at = (i, j) => (state.cursor = [n, i, j]);
    const look = (i, j) => {
      at(i, j);
      draw();
    };
    const paints = (paint) => (i, j, begins) => {
      at(i, j);
      paint(n, i, j, begins);
      draw();
    };
    const size = () => [SIDE, SIDE];
    const acts = [paints(paintTarget), paints(paintPrediction), look, look, look];
    const canvases = [target, prediction, ...gradients];
    canvases.forEach((element, k) => {
      const cursor = pointable(element, size, acts[k], look);
      element.addEventListener("focus", () => Object.assign(cursor, { i: state.cursor[1], j: state.cursor[2] }));
    });
    return canvases;
  });
}

const NAMES = {
  diceP: "Dice loss, in p",
  dice: "Dice loss, in z",
  bce: "cross entropy, in z",
  both: "their sum, in z",
};

function draw() {
  const shown = compute();
  const gradients = [
    shown.gradients[chosen("variable") === "p" ? "diceP" : "dice"],
    shown.gradients.bce,
    shown.gradients.both,
  ];
  const inLogits = Math.max(...["dice", "bce", "both"].map((name) => largestOf(shown.gradients[name])));
  const oneScale = (gradient) => byId("same-scale").checked && gradient !== shown.gradients.diceP;
  const colours = divergingColours();
  const [paper, ink, pink] = ["--surface", "--ink", "--window"].map(cssColour);
  const grey = (share) => paper.map((value, c) => value + share * (ink[c] - value));

  rows.forEach(([target, prediction, ...maps], n) => {
    const paint = (canvas, array, colour) => {
      drawMap(canvas, SIDE, SIDE, ZOOM, (k) => colour(array.data[n * PIXELS + k]));
      const [image, i, j] = state.cursor;
      if (image === n) drawBox(canvas, ZOOM, [i, i], [j, j], pink);
    };
    paint(target, state.target, grey);
    paint(prediction, shown.probabilities, grey);
    maps.forEach((canvas, k) => {
      const scale = oneScale(gradients[k]) ? inLogits : largestOf(gradients[k]) || 1;
      paint(canvas, gradients[k], (value) => colours(value / scale));
    });
  });

  byId("losses").innerHTML = Object.entries(NAMES)
    .map(([key, name]) => {
      const numbers = [format(shown.losses[key], 4), formatGradient(largestOf(shown.gradients[key]))];
      return `<tr><th scope="row">${name}</th>${numbers.map((text) => `<td>${text}</td>`).join("")}</tr>`;
    })
    .join("");
  const { tp, fp, fn, dice, iou } = shown.scores;
  const soft = 1 - shown.losses.diceP;
  byId("scores").innerHTML = Object.entries({
    [`soft Dice${state.images > 1 ? ` over ${state.over}` : ""}`]: format(soft, 4),
    "Dice of the mask p > 0.5": format(dice, 4),
    "IoU of the mask p > 0.5": format(iou, 4),
    "pixels hit, false, missed": `${tp}, ${fp}, ${fn}`,
  })
    .map(([name, text]) => `<tr><th scope="row">${name}</th><td>${text}</td></tr>`)
    .join("");

  const [n, i, j] = state.cursor;
  const at = n * PIXELS + i * SIDE + j;
  const g = shown.gradients;
  byId("pixel").textContent =
    `${state.images > 1 ? `Image ${n + 1}, row` : "Row"} ${i}, column ${j}: target ${state.target.data[at]}, ` +
    `z = ${format(state.logits.data[at], 2)}, p = ${format(shown.probabilities.data[at], 4)}. ` +
    `Dice says ${formatGradient(g.dice.data[at])} (in p ${formatGradient(g.diceP.data[at])}), ` +
    `cross entropy ${formatGradient(g.bce.data[at])}, together ${formatGradient(g.both.data[at])}.`;
  byId("smooth-value").textContent = format(state.smooth, 2);
  byId("brush-value").textContent = format(Number(byId("brush").value), 2);
}

// ---- the controls ---------------------------------------------------------------------------------------------------

for (const name of Object.keys(PRESETS)) byId("preset").append(new Option(name, name));
byId("preset").addEventListener("change", choosePreset);
for (const input of document.querySelectorAll('input[name="images"]')) {
  input.addEventListener("change", () => {
    setImages(Number(input.value));
    draw();
  });
}
for (const input of document.querySelectorAll('input[name="over"], #smooth')) {
  input.addEventListener("input", () => {
    state.over = chosen("over");
    state.smooth = 10 ** (Number(byId("smooth").value) / 10);
    draw();
  });
}
for (const input of document.querySelectorAll('input[name="variable"], #same-scale, #brush')) {
  input.addEventListener("input", draw);
}
byId("step").addEventListener("click", () => stepDownhill(1));
byId("steps").addEventListener("click", () => stepDownhill(30));
byId("anew").addEventListener("click", choosePreset);
onColourScheme(draw);

choosePreset();
