// What the three pages share: numbers and colours on the screen, grids to paint with a finger, a mouse or the keys.
"use strict";

const byId = (id) => document.getElementById(id);

/** The value of the checked radio button of a group. */
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

/** A number as people write it: few digits, a true minus. */
function format(value, digits = 3) {
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits) return value.toExponential(1).replaceAll("-", "−");
  const text = value.toFixed(digits);
  return (digits ? text.replace(/\.?0+$/, "") : text).replace("-", "−");
}

/** Background for a value in [-scale, scale]: blue below zero, orange above. Never so strong that text on it fades. */
function shade(value, scale) {
  if (!value || !scale) return "";
  const share = Math.round(65 * Math.min(Math.abs(value) / scale, 1));
  return `color-mix(in srgb, var(--${value > 0 ? "positive" : "negative"}) ${share}%, var(--surface))`;
}

/** The largest absolute value, and never 0: a scale for colours. */
function largest(values) {
  let result = 0;
  for (const value of values) result = Math.max(result, Math.abs(value));
  return result || 1;
}

/** Calls redraw when the reader's system goes from light to dark or back: what is drawn on a canvas does not know. */
function onColourScheme(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

const wantsNoMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * A grid of cells with numbers in them.
 *
 * One tab stop; the arrows move from cell to cell, space and Enter act on one, as a click does, and a drag on all that
 * it passes. act(i, j) is what to do; moveActs: whether an arrow alone acts too.
 */
class NumberGrid {
  constructor(element, { label, act = null, moveActs = () => false }) {
    this.element = element;
    this.act = act;
    this.focus = [0, 0];
    element.classList.add("grid");
    element.setAttribute("role", "grid");
    element.setAttribute("aria-label", label);
    if (!act) {
      element.style.touchAction = "auto"; // nothing to drag here: a finger may scroll
      return;
    }
    const actAt = (event) => {
      const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest(".cell");
      if (!cell || cell.parentElement.parentElement !== element) return;
      this.focus = [Number(cell.dataset.i), Number(cell.dataset.j)];
      this.act(...this.focus);
    };
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      actAt(event);
      this.focusCell();
    });
    element.addEventListener("pointermove", (event) => event.buttons && actAt(event));
    element.addEventListener("keydown", (event) => {
      if (event.key === " " || event.key === "Enter") {
        this.act(...this.focus);
      } else if (STEPS[event.key]) {
        const last = [this.cells.length - 1, this.cells[0].length - 1];
        this.focus = this.focus.map((place, k) => Math.min(Math.max(place + STEPS[event.key][k], 0), last[k]));
        if (moveActs()) this.act(...this.focus);
        this.focusCell();
      } else {
        return;
      }
      event.preventDefault();
    });
  }

  focusCell() {
    this.cells.flat().forEach((cell) => (cell.tabIndex = -1));
    const cell = this.cells[this.focus[0]][this.focus[1]];
    cell.tabIndex = 0;
    cell.focus({ preventScroll: true });
  }

  /** Show rows x columns cells; content(i, j) -> { text, label, background, classes }. Keeps cells that are there. */
  show(rows, columns, content) {
    if (this.cells?.length !== rows || this.cells[0].length !== columns) this.build(rows, columns);
    this.cells.forEach((row, i) =>
      row.forEach((cell, j) => {
        const { text, label = text, background = "", classes = "" } = content(i, j);
        if (cell.textContent !== text) cell.textContent = text;
        cell.setAttribute("aria-label", label);
        cell.style.background = background;
        cell.className = `cell ${classes}`;
      }),
    );
  }

  build(rows, columns) {
    this.element.replaceChildren();
    this.element.style.gridTemplateColumns = `repeat(${columns}, auto)`;
    this.focus = [Math.min(this.focus[0], rows - 1), Math.min(this.focus[1], columns - 1)];
    this.cells = Array.from({ length: rows }, (_, i) => {
      const row = this.element.appendChild(document.createElement("div"));
      row.setAttribute("role", "row");
      return Array.from({ length: columns }, (_, j) => {
        const cell = row.appendChild(document.createElement("div"));
        cell.setAttribute("role", "gridcell");
        Object.assign(cell.dataset, { i, j });
        if (this.act) cell.tabIndex = i === this.focus[0] && j === this.focus[1] ? 0 : -1;
        return cell;
      });
    });
  }
}

/** A CSS colour variable as [r, g, b], in the light or dark that is on. */
function cssColour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

/** What colours a canvas draws with: a function of (value in [-1, 1]) -> [r, g, b]. */
function divergingColours() {
  const [zero, positive, negative] = ["--surface", "--positive", "--negative"].map(cssColour);
  return (value) => {
    const end = value > 0 ? positive : negative;
    const share = Math.min(Math.abs(value), 1);
    return zero.map((z, k) => z + share * (end[k] - z));
  };
}

/** Draw H x W values on a canvas, zoom x zoom points each. colour(k) -> [r, g, b] of value k. */
function drawMap(canvas, H, W, zoom, colour) {
  const small = Object.assign(document.createElement("canvas"), { width: W, height: H });
  const picture = small.getContext("2d").createImageData(W, H);
  for (let k = 0; k < H * W; k++) {
    const [r, g, b] = colour(k);
    picture.data.set([r, g, b, 255], 4 * k);
  }
  small.getContext("2d").putImageData(picture, 0, 0);
  Object.assign(canvas, { width: W * zoom, height: H * zoom });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, W * zoom, H * zoom);
}

/** Outline the pixels of rows i0 to i1 and columns j0 to j1 of such a map, with a line of so many points. */
function drawBox(canvas, zoom, [i0, i1], [j0, j1], colour, points = 2) {
  const context = canvas.getContext("2d");
  context.strokeStyle = `rgb(${colour.join(" ")})`;
  context.lineWidth = points;
  const [left, top] = [j0 * zoom + points / 2, i0 * zoom + points / 2];
  context.strokeRect(left, top, (j1 - j0 + 1) * zoom - points, (i1 - i0 + 1) * zoom - points);
}

/**
 * Makes a canvas of H x W pixels something to point at: with mouse and finger, and with the arrow keys and space.
 *
 * act(i, j, begins) is called for a press, a drag and space, begins being false within a drag; move(i, j) whenever the
 * keys' cursor goes elsewhere. size() -> [H, W].
 * Returns an object with the cursor, { i, j }.
 */
function pointable(canvas, size, act, move = () => {}) {
  const cursor = { i: 0, j: 0 };
  const go = (i, j) => {
    const [H, W] = size();
    cursor.i = Math.min(Math.max(i, 0), H - 1);
    cursor.j = Math.min(Math.max(j, 0), W - 1);
  };
  const actAt = (event, begins) => {
    const [H, W] = size();
    const box = canvas.getBoundingClientRect();
    const [i, j] = [((event.clientY - box.top) / box.height) * H, ((event.clientX - box.left) / box.width) * W];
    go(Math.floor(i), Math.floor(j));
    act(cursor.i, cursor.j, begins);
  };
  canvas.tabIndex = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    actAt(event, true);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && actAt(event, false));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === " " || event.key === "Enter") {
      act(cursor.i, cursor.j, true);
    } else if (STEPS[event.key]) {
      const far = event.shiftKey ? 4 : 1;
      go(cursor.i + far * STEPS[event.key][0], cursor.j + far * STEPS[event.key][1]);
      move(cursor.i, cursor.j);
    } else {
      return;
    }
    event.preventDefault();
  });
  return cursor;
}
