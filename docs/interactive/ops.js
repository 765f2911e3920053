// The operations of minunet, once more, in JavaScript: what the pages beside this file compute with.
//
// Read it beside minunet/ops and minunet/network/loss.py. The formulas, their names and their order are the same. What
// differs is that NumPy multiplies whole arrays and JavaScript one number at a time: where Python has one line a
// kernel tap, here stand the loops that this line hides. They are written for the eye first, and then for speed.
//
// An array is { shape, data }: four lengths (N, H, W, C) or (KH, KW, C_in, C_out), and all values in a Float64Array,
// row by row, the last axis fastest. So the value at (n, i, j, c) lies at ((n * H + i) * W + j) * C + c.
//
// tests/docs/test_interactive.py runs these functions in a browser, and compares each with minunet's to 1e-6.
"use strict";

/** An array of zeros. */
function zeros(shape) {
  return { shape: [...shape], data: new Float64Array(shape.reduce((a, b) => a * b, 1)) };
}

/** An array of the given values. */
function tensor(shape, values) {
  const result = zeros(shape);
  if (values.length !== result.data.length) {
    throw new RangeError(`values must be ${result.data.length} for shape (${shape}), got ${values.length}`);
  }
  result.data.set(values);
  return result;
}

/** A new array: f of each value of a, and of the value of b at the same place. */
function map(f, a, b = a) {
  const result = zeros(a.shape);
  for (let k = 0; k < result.data.length; k++) result.data[k] = f(a.data[k], b.data[k]);
  return result;
}

// ---- convolution: minunet/ops/conv2d.py -----------------------------------------------------------------------------

/** The output's length along one axis, and the zeros to put before the input. padding: "same" or a number. */
function outputSize(size, kernel, stride, padding) {
  if (padding !== "same") return { out: Math.floor((size + 2 * padding - kernel) / stride) + 1, before: padding };
  const out = Math.ceil(size / stride);
  const total = Math.max((out - 1) * stride + kernel - size, 0);
  return { out, before: Math.floor(total / 2) }; // an odd zero goes to the bottom and to the right
}

/**
 * y[n, i, j, o] = bias[o] + sum over u, v, c of x_pad[n, s*i + u, s*j + v, c] * weight[u, v, c, o]
 *
 * bias is an array of C_out numbers, or null. Returns { y, cache }.
 */
function conv2dForward(x, weight, bias, stride = 1, padding = "same") {
  const [N, H, W, C] = x.shape;
  const [KH, KW, , O] = weight.shape;
  if (weight.shape[2] !== C) throw new RangeError(`weight must have C_in = ${C} like x, got (${weight.shape})`);
  const rows = outputSize(H, KH, stride, padding);
  const columns = outputSize(W, KW, stride, padding);
  if (rows.out < 1 || columns.out < 1) throw new RangeError("the padded x is smaller than the kernel");
  const y = zeros([N, rows.out, columns.out, O]);
  const cache = { x, weight, bias, stride, top: rows.before, left: columns.before, yShape: y.shape };
  if (bias) y.data.forEach((_, k) => (y.data[k] = bias.data[k % O]));
  forEachMeeting(cache, (xAt, yAt, wAt) => {
    for (let c = 0; c < C; c++) {
      const value = x.data[xAt + c];
      if (value === 0) continue;
      for (let o = 0; o < O; o++) y.data[yAt + o] += value * weight.data[wAt + c * O + o];
    }
  });
  return { y, cache };
}

/**
 * dx, dweight and dbias (null if there was no bias) from dy.
 *
 * Forward multiplies, at each meeting of a pixel and a tap: y += x * weight. The product rule gives each factor the
 * other one: dx += dy * weight, and dweight += x * dy. The meetings are the same, so the loop is the same.
 */
function conv2dBackward(dy, cache) {
  const { x, weight, bias } = cache;
  const [, , C, O] = weight.shape;
  const dx = zeros(x.shape);
  const dweight = zeros(weight.shape);
  forEachMeeting(cache, (xAt, yAt, wAt) => {
    if (allZero(dy.data, yAt, O)) return; // most of dy, where one asks about a single pixel
    for (let c = 0; c < C; c++) {
      const value = x.data[xAt + c];
      let sum = 0;
      for (let o = 0; o < O; o++) {
        const d = dy.data[yAt + o];
        sum += d * weight.data[wAt + c * O + o];
        dweight.data[wAt + c * O + o] += value * d;
      }
      dx.data[xAt + c] += sum; // += : windows overlap, and each of them has its share
    }
  });
  return { dx, dweight, dbias: bias && sumOverPixels(dy) };
}

/**
 * Calls meet(xAt, yAt, wAt) wherever an input pixel and a kernel tap make an output pixel: three places, of the first
 * channel in x, in y and in weight. Pixels of the padding are skipped: they are zero and give nothing, and they are no
 * input and get nothing.
 */
function forEachMeeting({ x, weight, stride, top, left, yShape }, meet) {
  const [N, H, W, C] = x.shape;
  const [KH, KW, , O] = weight.shape;
  const [, outH, outW] = yShape;
  for (let u = 0; u < KH; u++) {
    for (let v = 0; v < KW; v++) {
      for (let n = 0; n < N; n++) {
        for (let i = 0; i < outH; i++) {
          const row = stride * i + u - top;
          if (row < 0 || row >= H) continue;
          for (let j = 0; j < outW; j++) {
            const column = stride * j + v - left;
            if (column < 0 || column >= W) continue;
            meet(((n * H + row) * W + column) * C, ((n * outH + i) * outW + j) * O, (u * KW + v) * C * O);
          }
        }
      }
    }
  }
}

/** Whether `count` values from `at` on are all zero. */
function allZero(data, at, count) {
  for (let k = at; k < at + count; k++) if (data[k] !== 0) return false;
  return true;
}

/** The sum over images and pixels, channel by channel: the gradient of a bias. */
function sumOverPixels(dy) {
  const C = dy.shape[3];
  const sums = zeros([C]);
  dy.data.forEach((d, k) => (sums.data[k % C] += d));
  return sums;
}

// ---- transposed convolution: minunet/ops/conv_transpose2d.py --------------------------------------------------------

/** With padding "same": the output's length along one axis, and how many rows of the full result are cropped above. */
function transposedSize(size, kernel, stride) {
  return { out: stride * size, crop: Math.floor(Math.max(kernel - stride, 0) / 2) };
}

/**
 * Each input pixel paints a patch.
 *
 * y[s*i + u - crop, s*j + v - crop, o] += sum over c of x[i, j, c] * weight[u, v, c, o], and the bias once.
 */
function convTranspose2dForward(x, weight, bias, stride = 2) {
  const [N, H, W, C] = x.shape;
  const [KH, KW, , O] = weight.shape;
  const rows = transposedSize(H, KH, stride);
  const columns = transposedSize(W, KW, stride);
  const y = zeros([N, rows.out, columns.out, O]);
  const cache = { x, weight, bias, stride, top: rows.crop, left: columns.crop, yShape: y.shape };
  if (bias) y.data.forEach((_, k) => (y.data[k] = bias.data[k % O]));
  forEachPatch(cache, (xAt, yAt, wAt) => {
    for (let c = 0; c < C; c++) {
      const value = x.data[xAt + c];
      if (value === 0) continue;
      for (let o = 0; o < O; o++) y.data[yAt + o] += value * weight.data[wAt + c * O + o];
    }
  });
  return { y, cache };
}

/** The product rule again, over the same meetings: each pixel gathers from the patch that it has painted. */
function convTranspose2dBackward(dy, cache) {
  const { x, weight, bias } = cache;
  const [, , C, O] = weight.shape;
  const dx = zeros(x.shape);
  const dweight = zeros(weight.shape);
  forEachPatch(cache, (xAt, yAt, wAt) => {
    if (allZero(dy.data, yAt, O)) return;
    for (let c = 0; c < C; c++) {
      for (let o = 0; o < O; o++) {
        const d = dy.data[yAt + o];
        dx.data[xAt + c] += d * weight.data[wAt + c * O + o];
        dweight.data[wAt + c * O + o] += x.data[xAt + c] * d;
      }
    }
  });
  return { dx, dweight, dbias: bias && sumOverPixels(dy) };
}

/** As forEachMeeting, with reading and writing exchanged: pixel (i, j) of x meets (s*i + u, s*j + v) of y. */
function forEachPatch({ x, weight, stride, top, left, yShape }, meet) {
  const exchanged = { x: { shape: yShape }, weight: { shape: [...weight.shape.slice(0, 2), yShape[3], x.shape[3]] } };
  forEachMeeting({ ...exchanged, stride, top, left, yShape: x.shape }, (yAt, xAt, wAt) => meet(xAt, yAt, wAt));
}

// ---- max pooling, ReLU, concatenation, batch norm: minunet/ops ------------------------------------------------------

/** The largest of each 2 x 2 pixels, channel by channel; the first of equals. The cache says who won. */
function maxPool2dForward(x, size = 2) {
  const [N, H, W, C] = x.shape;
  if (H % size || W % size)
    throw new RangeError(`x must have a height and width that ${size} divides, got (${x.shape})`);
  const y = zeros([N, H / size, W / size, C]);
  const winner = new Int32Array(y.data.length); // where in x it lies
  let k = 0;
  for (let n = 0; n < N; n++) {
    for (let i = 0; i < H; i += size) {
      for (let j = 0; j < W; j += size) {
        for (let c = 0; c < C; c++, k++) {
          let best = -1;
          for (let u = 0; u < size; u++) {
            for (let v = 0; v < size; v++) {
              const at = ((n * H + i + u) * W + j + v) * C + c;
              if (best < 0 || x.data[at] > x.data[best]) best = at;
            }
          }
          winner[k] = best;
          y.data[k] = x.data[best];
        }
      }
    }
  }
  return { y, cache: { winner, xShape: x.shape } };
}

/** The winner takes all of the gradient. */
function maxPool2dBackward(dy, { winner, xShape }) {
  const dx = zeros(xShape);
  winner.forEach((at, k) => (dx.data[at] = dy.data[k]));
  return dx;
}

/** max(x, 0); the cache is x. */
function reluForward(x) {
  return { y: map((a) => (a > 0 ? a : 0), x), cache: x };
}

/** The gradient passes where x was positive. */
function reluBackward(dy, x) {
  return map((d, a) => (a > 0 ? d : 0), dy, x);
}

/** [up, skip], side by side along the channels. */
function concatForward(up, skip) {
  const [N, H, W, U] = up.shape;
  const S = skip.shape[3];
  const y = zeros([N, H, W, U + S]);
  for (let p = 0; p < N * H * W; p++) {
    y.data.set(up.data.subarray(p * U, (p + 1) * U), p * (U + S));
    y.data.set(skip.data.subarray(p * S, (p + 1) * S), p * (U + S) + U);
  }
  return { y, cache: { up: up.shape, skip: skip.shape } };
}

/** Nothing was computed, so backward only splits. */
function concatBackward(dy, { up, skip }) {
  const dup = zeros(up);
  const dskip = zeros(skip);
  const [U, S] = [up[3], skip[3]];
  for (let p = 0; p < dy.data.length / (U + S); p++) {
    const at = p * (U + S);
    dup.data.set(dy.data.subarray(at, at + U), p * U);
    dskip.data.set(dy.data.subarray(at + U, at + U + S), p * S);
  }
  return { dup, dskip };
}

/** Batch norm of a trained network: mean and variance are constants, so it is a scale and a shift of each channel. */
function batchNorm2dForward(x, { gamma, beta, runningMean, runningVar }, eps = 1e-3) {
  const C = x.shape[3];
  const scale = gamma.data.map((g, c) => g / Math.sqrt(runningVar.data[c] + eps));
  const y = zeros(x.shape);
  for (let k = 0; k < y.data.length; k++) {
    const c = k % C;
    y.data[k] = scale[c] * (x.data[k] - runningMean.data[c]) + beta.data[c];
  }
  return { y, cache: { scale } };
}

/** The scale, once more. */
function batchNorm2dBackward(dy, { scale }) {
  const dx = zeros(dy.shape);
  for (let k = 0; k < dx.data.length; k++) dx.data[k] = dy.data[k] * scale[k % scale.length];
  return dx;
}

// ---- from logits to losses: minunet/ops/{sigmoid,dice_loss,bce_with_logits}.py, minunet/network/loss.py ---------

/** 1 / (1 + exp(-z)), by an exponential that cannot overflow. */
function sigmoid(z) {
  const e = Math.exp(-Math.abs(z));
  return z > 0 ? 1 / (1 + e) : e / (1 + e);
}

/**
 * 1 - Dice, with Dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth).
 *
 * The sums run over the batch, or over each image, and then the images' losses are averaged. Returns { loss, cache }.
 */
function diceLossForward(probabilities, target, smooth = 1, over = "batch") {
  const groups = over === "batch" ? 1 : probabilities.shape[0];
  const size = probabilities.data.length / groups; // values in a group: the batch, or an image
  const dice = new Float64Array(groups);
  const denominator = new Float64Array(groups);
  let loss = 0;
  for (let g = 0; g < groups; g++) {
    let [overlap, pSum, tSum] = [0, 0, 0];
    for (let k = g * size; k < (g + 1) * size; k++) {
      const [p, t] = [probabilities.data[k], target.data[k]];
      overlap += p * t;
      pSum += p;
      tSum += t;
    }
    denominator[g] = pSum + tSum + smooth;
    dice[g] = (2 * overlap + smooth) / denominator[g];
    loss += (1 - dice[g]) / groups;
  }
  return { loss, cache: { target, dice, denominator, size } };
}

/** The quotient rule, for each pixel: dDice/dp = (2t - Dice) / denominator. */
function diceLossBackward({ target, dice, denominator, size }) {
  const dprobabilities = zeros(target.shape);
  for (let k = 0; k < dprobabilities.data.length; k++) {
    const g = Math.floor(k / size);
    dprobabilities.data[k] = (dice[g] - 2 * target.data[k]) / (denominator[g] * dice.length);
  }
  return dprobabilities;
}

/** Cross entropy of sigmoid(z), averaged: max(z, 0) - t z + log(1 + exp(-|z|)) neither overflows nor takes log 0. */
function bceWithLogitsForward(logits, target) {
  let sum = 0;
  logits.data.forEach((z, k) => (sum += Math.max(z, 0) - target.data[k] * z + Math.log1p(Math.exp(-Math.abs(z)))));
  return { loss: sum / logits.data.length, cache: { logits, target } };
}

/** (s(z) - t) / number of values: how far the prediction is from the answer. */
function bceWithLogitsBackward({ logits, target }) {
  return map((z, t) => (sigmoid(z) - t) / logits.data.length, logits, target);
}

/** diceWeight * Dice loss of sigmoid(logits) + bceWeight * cross entropy of logits. */
function segmentationLossForward(logits, target, { diceWeight = 1, bceWeight = 1, smooth = 1, over = "batch" } = {}) {
  const dice = diceLossForward(map(sigmoid, logits), target, smooth, over);
  const bce = bceWithLogitsForward(logits, target);
  const cache = { logits, dice: dice.cache, bce: bce.cache, diceWeight, bceWeight };
  return { loss: diceWeight * dice.loss + bceWeight * bce.loss, cache };
}

/** The gradient of Dice goes through the sigmoid, slope s(z) * s(-z); that of the cross entropy of logits has been. */
function segmentationLossBackward({ logits, dice, bce, diceWeight, bceWeight }) {
  const dlogits = map((z, d) => diceWeight * d * sigmoid(z) * sigmoid(-z), logits, diceLossBackward(dice));
  return map((a, b) => a + bceWeight * b, dlogits, bceWithLogitsBackward(bce));
}

/** What people count: both masks hard, thresholded at 0.5. Two empty masks agree, and score 1. (minunet/training/metrics.py) */
function hardScores(probabilities, target) {
  let [tp, fp, fn] = [0, 0, 0];
  probabilities.data.forEach((p, k) => {
    if (p > 0.5 && target.data[k] > 0.5) tp++;
    else if (p > 0.5) fp++;
    else if (target.data[k] > 0.5) fn++;
  });
  const empty = tp + fp + fn === 0;
  return { tp, fp, fn, dice: empty ? 1 : (2 * tp) / (2 * tp + fp + fn), iou: empty ? 1 : tp / (tp + fp + fn) };
}
