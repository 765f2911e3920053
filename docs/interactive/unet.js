// A U-Net, line by line: minunet/network/unet.py and minunet/network/blocks.py for the explorer, which wants to look at every line.
//
// unetForward returns the list of its lines in the order in which they ran. Each has a name (that of minunet's
// summary), the names of the lines that it read, what it computed, and its backward. unetBackward reads the list from
// the last line to the first. That is all that backpropagation is.
"use strict";

/**
 * The lines of a forward pass of the network with these arrays, as it infers: no dropout, running statistics.
 *
 * widths: channels of each level. arrays: by minunet's names, such as "down1.conv1.weight". x: (N, H, W, C).
 * A line is { name, kind, inputs, y, backward, seen }. backward(dy) gives one gradient for each input.
 * seen([first, last]) says from which rows of its inputs the rows first to last of y came; columns are like rows.
 */
function unetForward(widths, arrays, x) {
  const depth = widths.length - 1;
  const lines = [{ name: "image", kind: "image", inputs: [], y: x }];
  const value = (name) => lines.find((line) => line.name === name).y;
  const add = (name, kind, inputs, y, backward, seen = (rows) => rows) => {
    lines.push({ name, kind, inputs, y, backward, seen });
    return name;
  };

  function conv(name, from) {
    const { y, cache } = conv2dForward(value(from), arrays[`${name}.weight`], arrays[`${name}.bias`] || null);
    const kernel = arrays[`${name}.weight`].shape[0];
    const seen = ([first, last]) => [first - cache.top, last - cache.top + kernel - 1];
    return add(name, `convolution ${kernel}×${kernel}`, [from], y, (dy) => [conv2dBackward(dy, cache).dx], seen);
  }

  function norm(name, from) {
    const [gamma, beta] = [arrays[`${name}.gamma`], arrays[`${name}.beta`]];
    const [runningMean, runningVar] = [arrays[`${name}.running_mean`], arrays[`${name}.running_var`]];
    const { y, cache } = batchNorm2dForward(value(from), { gamma, beta, runningMean, runningVar });
    return add(name, "batch norm", [from], y, (dy) => [batchNorm2dBackward(dy, cache)]);
  }

  function relu(name, from) {
    const { y, cache } = reluForward(value(from));
    return add(name, "ReLU", [from], y, (dy) => [reluBackward(dy, cache)]);
  }

  function doubleConv(room, from) {
    from = relu(`${room}.relu1`, norm(`${room}.norm1`, conv(`${room}.conv1`, from)));
    return relu(`${room}.relu2`, norm(`${room}.norm2`, conv(`${room}.conv2`, from)));
  }

  function pool(name, from) {
    const { y, cache } = maxPool2dForward(value(from));
    const seen = ([first, last]) => [2 * first, 2 * last + 1];
    return add(name, "max pool 2×2", [from], y, (dy) => [maxPool2dBackward(dy, cache)], seen);
  }

  function up(name, from) {
    const { y, cache } = convTranspose2dForward(value(from), arrays[`${name}.weight`], arrays[`${name}.bias`]);
    const kernel = arrays[`${name}.weight`].shape[0];
    // Patch i covers the rows 2i - crop to 2i - crop + kernel - 1.
    const seen = ([first, last]) => [
      Math.ceil((first + cache.top - (kernel - 1)) / 2),
      Math.floor((last + cache.top) / 2),
    ];
    const kind = `transposed convolution ${kernel}×${kernel}`;
    return add(name, kind, [from], y, (dy) => [convTranspose2dBackward(dy, cache).dx], seen);
  }

  function concat(name, from, skip) {
    const { y, cache } = concatForward(value(from), value(skip));
    const backward = (dy) => {
      const { dup, dskip } = concatBackward(dy, cache);
      return [dup, dskip];
    };
    return add(name, "concat [up, skip]", [from, skip], y, backward);
  }

  // From here on as in UNet.forward.
  let at = "image";
  const skips = [];
  for (let level = 1; level <= depth; level++) {
    skips.push(doubleConv(`down${level}`, at));
    at = pool(`down${level}.pool`, skips[level - 1]);
  }
  at = doubleConv("bottleneck", at);
  for (let level = depth; level >= 1; level--) {
    at = concat(`up${level}.concat`, up(`up${level}.up`, at), skips[level - 1]);
    at = doubleConv(`up${level}`, at);
  }
  conv("head", at);
  return lines;
}

/**
 * The gradient in each line's y of a number that was computed from the line called `name`, where its gradient is dy.
 *
 * Returns { total, arrivals }, two objects by line name. total: the gradients, for the lines that the gradient reaches.
 * arrivals: from which of its readers it came, [{ from, d }, ...]. A line that was read twice has two, and they add.
 */
function unetBackward(lines, name, dy) {
  const total = { [name]: dy };
  const arrivals = {};
  for (const line of [...lines].reverse()) {
    if (!total[line.name] || !line.backward) continue;
    line.backward(total[line.name]).forEach((d, k) => {
      const input = line.inputs[k];
      // The skip was used twice, by the pool and by the other side of the U: its gradient is the sum of both.
      total[input] = total[input] ? map((a, b) => a + b, total[input], d) : d;
      (arrivals[input] ||= []).push({ from: line.name, d });
    });
  }
  return { total, arrivals };
}

/** The receptive field: by line name, the first and last row of those from which `rows` of the line `name` came. */
function unetSeen(lines, name, rows) {
  const seen = { [name]: rows };
  for (const line of [...lines].reverse()) {
    if (!seen[line.name] || !line.seen) continue;
    const [first, last] = line.seen(seen[line.name]);
    for (const input of line.inputs) {
      // Over the skip and through the levels below: a pixel sees what either of them sees.
      const before = seen[input] || [first, last];
      seen[input] = [Math.min(before[0], first), Math.max(before[1], last)];
    }
  }
  return seen;
}

/** An array from the exporter's { shape, dtype, base64 }. */
function decodeArray({ shape, dtype, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const types = { uint8: Uint8Array, float32: Float32Array, float64: Float64Array };
  return tensor(shape, new types[dtype](bytes.buffer)); // little-endian, as every machine with a browser is
}

/** The network's input from an exported image: clipped and scaled as minunet/data/normalize.py does it. */
function normalizedPixels({ pixels, normalization: { low, high, mean, std } }) {
  const grey = decodeArray(pixels);
  const [H, W, C] = grey.shape;
  const x = zeros([1, H, W, C]);
  grey.data.forEach((value, k) => {
    const c = k % C;
    x.data[k] = (Math.min(Math.max(value, low[c]), high[c]) - mean[c]) / std[c];
  });
  return x;
}
