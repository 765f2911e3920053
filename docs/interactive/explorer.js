// explorer.html: a trained network's forward pass (unet.js), and the way back from any number in it.
"use strict";

const ARRAYS = Object.fromEntries(
  Object.entries(EXPLORER_DATA.arrays).map(([name, array]) => [name, decodeArray(array)]),
);
const LARGE = 384; // points of a large canvas

/** The lines that the U shows, level by level: the other lines are in the list. */
const ROOMS = [
  ["image", "down1.relu1", "down1.relu2", "up1.up", "up1.relu1", "up1.relu2", "head"],
  ["down1.pool", "down2.relu1", "down2.relu2", "up2.up", "up2.relu1", "up2.relu2"],
  ["down2.pool", "bottleneck.relu1", "bottleneck.relu2"],
];

const state = {
  image: 0,
  lines: [], // the forward pass
  name: "head", // of the chosen line
  channel: 0,
  pixel: [0, 0],
  back: null, // { total, arrivals }, by line name
  seen: null, // { rows, columns }, each by line name
};

const line = (name = state.name) => state.lines.find((candidate) => candidate.name === name);

/** Value (i, j, c) of an array of one image. */
const valueAt = ({ shape: [, , W, C], data }, i, j, c) => data[(i * W + j) * C + c];

// ---- forward and backward -------------------------------------------------------------------------------------------

function runForward() {
  const chosenImage = EXPLORER_DATA.images[state.image];
  state.lines = unetForward(EXPLORER_DATA.config.widths, ARRAYS, normalizedPixels(chosenImage));
  const [ours, theirs] = [line("head").y.data, decodeArray(chosenImage.logits).data];
  const worst = ours.reduce((most, value, k) => Math.max(most, Math.abs(value - theirs[k])), 0);
  byId("agreement").textContent = `The logits of this page differ from minunet's by at most ${worst.toExponential(0)}.`;
}

/** The gradient with which the way back begins, and the line where. */
function seed() {
  if (chosen("seed") === "loss") {
    const logits = line("head").y;
    const mask = decodeArray(EXPLORER_DATA.images[state.image].mask);
    const { cache } = segmentationLossForward(logits, tensor(logits.shape, mask.data));
    return { name: "head", dy: segmentationLossBackward(cache) };
  }
  const { shape } = line().y;
  const [, H, W, C] = shape;
  const dy = zeros(shape);
  const [i, j] = state.pixel;
  if (chosen("seed") === "pixel") dy.data[(i * W + j) * C + state.channel] = 1;
  else for (let p = 0; p < H * W; p++) dy.data[p * C + state.channel] = 1;
  return { name: state.name, dy };
}

function runBackward() {
  const { name, dy } = seed();
  state.back = unetBackward(state.lines, name, dy);
  const [, H, W] = line(name).y.shape;
  const single = chosen("seed") === "pixel";
  const [rows, columns] = single
    ? state.pixel.map((place) => [place, place])
    : [
        [0, H - 1],
        [0, W - 1],
      ];
  state.seen = { rows: unetSeen(state.lines, name, rows), columns: unetSeen(state.lines, name, columns) };
}

/** A picture of one channel of an array of one image: { H, W, values }. */
function channelOf({ shape: [, H, W, C], data }, c) {
  return { H, W, values: Float64Array.from({ length: H * W }, (_, p) => data[p * C + c]) };
}

/** A picture of all channels together: the sum of their sizes at each pixel. */
function sizesOf({ shape: [, H, W, C], data }) {
  const values = new Float64Array(H * W);
  for (let k = 0; k < data.length; k++) values[Math.floor(k / C)] += Math.abs(data[k]);
  return { H, W, values };
}

/** Its square root, so that small values are seen beside a large one. */
const softened = ({ H, W, values }) => ({ H, W, values: values.map((v) => Math.sqrt(v)) });

/** The side of the smallest square about a pixel, cut off at the border, that holds half of all the gradient. */
function halfSquare({ H, W, values }, [i, j]) {
  const total = values.reduce((sum, value) => sum + value, 0);
  for (let reach = 0; ; reach++) {
    let inside = 0;
    for (let p = Math.max(i - reach, 0); p <= Math.min(i + reach, H - 1); p++) {
      for (let q = Math.max(j - reach, 0); q <= Math.min(j + reach, W - 1); q++) inside += values[p * W + q];
    }
    if (2 * inside >= total) return 2 * reach + 1;
  }
}

// ---- the pictures ---------------------------------------------------------------------------------------------------

/** The part of a line that the chosen number saw, cut off at its borders; null if it saw nothing of it. */
function seenPart(name) {
  const rows = state.seen.rows[name];
  if (!rows) return null;
  const [, H, W] = line(name).y.shape;
  const cut = ([first, last], size) => [Math.max(first, 0), Math.min(last, size - 1)];
  return { rows: cut(rows, H), columns: cut(state.seen.columns[name], W) };
}

function drawValues(canvas, points, { H, W, values }, name) {
  const zoom = Math.max(1, Math.floor(points / H));
  const colours = divergingColours();
  const scale = largest(values);
  drawMap(canvas, H, W, zoom, (k) => colours(values[k] / scale));
  const part = seenPart(name);
  const stroke = points < LARGE ? 4 : 2; // a small picture is shown smaller still
  if (part) drawBox(canvas, zoom, part.rows, part.columns, cssColour("--window"), stroke);
}

const thumbnails = {}; // by line name, the canvas in the U
let channelButtons = [];

function draw() {
  const gradients = chosen("show") === "gradients";
  for (const [name, canvas] of Object.entries(thumbnails)) {
    const { y } = line(name);
    const array = gradients ? (state.back.total[name] ?? zeros(y.shape)) : y;
    drawValues(canvas, 128, gradients ? softened(sizesOf(array)) : sizesOf(array), name);
    canvas.parentElement.setAttribute("aria-pressed", name === state.name);
  }

  const { y, kind } = line();
  const [, H, W, C] = y.shape;
  const shown = gradients ? (state.back.total[state.name] ?? zeros(y.shape)) : y;
  drawValues(byId("map"), LARGE, channelOf(shown, state.channel), state.name);
  const caption = `${state.name}, channel ${state.channel}${gradients ? ", gradient" : ""}: ${H} × ${W} pixels`;
  byId("map-caption").textContent = caption;
  byId("map").setAttribute("aria-label", `${caption}. The arrows move the pixel.`);
  channelButtons.forEach((button, c) => {
    drawValues(button.firstChild, 64, channelOf(shown, c), "");
    button.setAttribute("aria-checked", c === state.channel);
    button.tabIndex = c === state.channel ? 0 : -1;
  });

  drawPicture();
  const dx = sizesOf(state.back.total.image);
  drawValues(byId("heat"), LARGE, softened(dx), "image");
  describe(kind, valueAt(y, ...state.pixel, state.channel), dx, C);
  fillMeetings();
  fillLines();
}

function drawPicture() {
  const { pixels, mask, normalization } = EXPLORER_DATA.images[state.image];
  const [grey, tumour] = [decodeArray(pixels), decodeArray(mask).data];
  const [H, W] = grey.shape;
  const pink = cssColour("--window");
  const { low, high } = normalization;
  const isEdge = (k) => tumour[k] && [1, -1, W, -W].some((step) => !tumour[k + step]);
  drawMap(byId("picture"), H, W, LARGE / H, (k) =>
    isEdge(k) ? [255, 220, 0] : [0, 1, 2].map((c) => (255 * (grey.data[3 * k + c] - low[c])) / (high[c] - low[c])),
  );
  const part = seenPart("image");
  drawBox(byId("picture"), LARGE / H, part.rows, part.columns, pink);
  byId("picture").setAttribute("aria-label", `The image ${EXPLORER_DATA.images[state.image].name}`);
  byId("heat").setAttribute("aria-label", `The gradient in the image`);
}

/** What is to be said of the chosen number, in words. */
function describe(kind, value, dx, channels) {
  const [i, j] = state.pixel;
  byId("number").textContent =
    `${state.name} (${kind}), channel ${state.channel} of ${channels}, row ${i}, column ${j}: ${format(value)}. ` +
    whereFrom(dx);
}

/** What the way back has found. */
function whereFrom(dx) {
  if (chosen("seed") === "loss") return "The way back begins at the loss, Dice + cross entropy of the prediction.";
  if (chosen("seed") === "channel") return "The way back begins at the sum of this channel's values.";
  const [whole, part] = [{ rows: state.seen.rows.image, columns: state.seen.columns.image }, seenPart("image")];
  const extent = ({ rows, columns }) => `${rows[1] - rows[0] + 1} × ${columns[1] - columns[0] + 1}`;
  const cut = extent(part) === extent(whole) ? "" : `, of which ${extent(part)} lie in the image`;
  const square = `It was made from ${extent(whole)} pixels${cut}.`;
  if (dx.values.every((d) => d === 0)) return `${square} No gradient reaches the image: a closed ReLU lets none pass.`;
  const jump = line("image").y.shape[1] / line().y.shape[1]; // image pixels from one pixel of this line to the next
  const half = halfSquare(
    dx,
    state.pixel.map((place) => Math.floor((place + 0.5) * jump)),
  );
  return `${square} Half of the gradient comes from ${half} × ${half} around it.`;
}

const size = ({ data }) => data.reduce((sum, d) => sum + Math.abs(d), 0);

function fillMeetings() {
  const rows = Object.entries(state.back.arrivals).filter(([, arrivals]) => arrivals.length === 2);
  const cells = rows.map(([name, arrivals]) => {
    const total = arrivals.reduce((sum, { d }) => sum + size(d), 0);
    const parts = arrivals.map(
      ({ from, d }) => `<td>${total ? format((100 * size(d)) / total, 0) : 0} % from ${from}</td>`,
    );
    return `<tr><th scope="row"><code>${name}</code></th>${parts.join("")}</tr>`;
  });
  byId("meetings").innerHTML =
    cells.join("") ||
    "<tr><th>From this line the way back passes no such place: every line on it is read once.</th></tr>";
}

function fillLines() {
  const head = ["line", "what", "output", "rows seen", "Σ |gradient|"].map((text) => `<th scope="col">${text}</th>`);
  const rows = [...state.lines].reverse().flatMap(({ name, kind, y }) => {
    const total = state.back.total[name];
    const part = seenPart(name);
    if (!total || !part) return [];
    const cells = [y.shape.slice(1).join(" × "), `${part.rows[0]} to ${part.rows[1]}`, format(size(total))];
    const numbers = cells.map((text) => `<td>${text}</td>`).join("");
    return [`<tr><th scope="row"><code>${name}</code></th><th>${kind}</th>${numbers}</tr>`];
  });
  byId("lines").innerHTML = `<thead><tr>${head.join("")}</tr></thead><tbody>${rows.join("")}</tbody>`;
}

// ---- what acts ------------------------------------------------------------------------------------------------------

let waiting = false;
/** Go back from the chosen number and show it all, at most once a frame. */
function update() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    runBackward();
    draw();
  });
}

function chooseLine(name) {
  const before = line().y.shape;
  state.name = name;
  const [, H, W, C] = line().y.shape;
  state.pixel = [
    Math.floor(((state.pixel[0] + 0.5) * H) / before[1]),
    Math.floor(((state.pixel[1] + 0.5) * W) / before[2]),
  ];
  const here = Array.from({ length: C }, (_, c) => valueAt(line().y, ...state.pixel, c));
  state.channel = here.indexOf(Math.max(...here)); // one with something to say here: many are 0
  Object.assign(cursor, { i: state.pixel[0], j: state.pixel[1] });
  byId("line").value = name;
  buildChannels(C);
  update();
}

function choosePixel(i, j) {
  state.pixel = [i, j];
  document.querySelector('input[name="seed"][value="pixel"]').checked = true;
  update();
}

function buildU() {
  for (const level of ROOMS) {
    const row = byId("u").appendChild(document.createElement("div"));
    for (const name of level) {
      const button = row.appendChild(Object.assign(document.createElement("button"), { type: "button", title: name }));
      thumbnails[name] = button.appendChild(document.createElement("canvas"));
      button.appendChild(document.createElement("span")).innerHTML = name.replace(".", ".<wbr>");
      button.addEventListener("click", () => chooseLine(name));
    }
  }
}

function buildChannels(count) {
  channelButtons = Array.from({ length: count }, (_, c) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", `channel ${c}`);
    button.append(document.createElement("canvas"));
    button.addEventListener("click", () => {
      state.channel = c;
      update();
    });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      state.channel = (c + step + count) % count;
      channelButtons[state.channel].focus();
      update();
    });
    return button;
  });
  byId("channels").replaceChildren(...channelButtons);
}

/** The middle of the tumour; of the image, if there is none. */
function startPixel() {
  const {
    data,
    shape: [H, W],
  } = decodeArray(EXPLORER_DATA.images[state.image].mask);
  let [count, rows, columns] = [0, 0, 0];
  data.forEach((t, k) => {
    count += t;
    rows += t * Math.floor(k / W);
    columns += t * (k % W);
  });
  return count ? [Math.round(rows / count), Math.round(columns / count)] : [H / 2, W / 2];
}

function chooseImage() {
  state.image = Number(byId("image").value);
  runForward();
  Object.assign(state, { name: "head", channel: 0, pixel: startPixel() });
  chooseLine("head");
}

const cursor = pointable(byId("map"), () => line().y.shape.slice(1, 3), choosePixel, choosePixel);
buildU();
EXPLORER_DATA.images.forEach(({ name }, k) => byId("image").append(new Option(name, k)));
byId("image").addEventListener("change", chooseImage);
byId("line").addEventListener("change", () => chooseLine(byId("line").value));
for (const input of document.querySelectorAll('input[name="show"], input[name="seed"]'))
  input.addEventListener("change", update);
onColourScheme(draw);

runForward();
for (const { name, kind } of state.lines) byId("line").append(new Option(`${name}: ${kind}`, name));
chooseImage();
