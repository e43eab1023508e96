'use strict';
// What of an image ran, or would run at another rate, and what it costs. Nothing here touches the page.
// Maps are flat: layer, frame, row, column. Rates are means over the cells that were seen (not NaN).

const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

function decode(codes, lows, highs) {
  const unseen = codes.BYTES_PER_ELEMENT === 1 ? 255 : 65535, each = codes.length / lows.length;
  return Float64Array.from(codes, (code, i) => {
    const layer = Math.floor(i / each);
    return code === unseen ? NaN : lows[layer] + code / (unseen - 1) * (highs[layer] - lows[layer]);
  });
}

function unpack(image) {
  if (image.ran) return;
  const layers = image.layers.length;
  image.rates = image.rates.map(rate => rate ?? NaN);
  image.ran = decode(bytes(image.masks), Array(layers).fill(0), Array(layers).fill(1));
  if (!image.logits) return;
  const logits = decode(new Uint16Array(bytes(image.logits.codes).buffer), image.logits.lows, image.logits.highs);
  image.ranking = [...logits.keys()].filter(i => !isNaN(logits[i])).sort((a, b) => logits[b] - logits[a]);
}

// One threshold for all layers and frames: the cells with the highest logits run.
function decide(image, rate) {
  const ran = new Float64Array(image.ran.length).fill(NaN), active = Math.round(rate * image.ranking.length);
  image.ranking.forEach((cell, rank) => { ran[cell] = rank < active ? 1 : 0; });
  return ran;
}

function mean(values) {
  const seen = values.filter(value => !isNaN(value));
  return seen.length ? seen.reduce((sum, value) => sum + value, 0) / seen.length : NaN;
}

const slice = (values, part, parts) => values.subarray(part * values.length / parts, (part + 1) * values.length / parts);
const ratesOf = (ran, layers) => Array.from({length: layers}, (_, layer) => mean(slice(ran, layer, layers)));

function interpolate(points, x) {
  let i = 1;
  while (i < points.length - 1 && points[i][0] < x) i++;
  const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
  return y0 + (y1 - y0) * (x - x0) / (x1 - x0);
}

const estimate = (image, rates) => image.costs.length === rates.length
  ? image.rest + image.costs.reduce((sum, points, layer) => sum + interpolate(points, rates[layer]), 0) / 1e9 : NaN;
