// A picture as the network wants it: resized, cropped and normalized as in Python, to the pixel but for rounding.

const cubic = (x) => {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
};
const triangle = (x) => Math.max(0, 1 - Math.abs(x));
const FILTERS = { bilinear: [triangle, 1], bicubic: [cubic, 2] };

// For each new position: the first old one that it takes from, and how much it takes of that and the next ones.
function taps(from, to, [filter, reach]) {
  const scale = Math.max(from / to, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = ((i + 0.5) * from) / to;
    const first = Math.max(0, Math.floor(center - reach * scale + 0.5));
    const end = Math.min(from, Math.floor(center + reach * scale + 0.5));
    const shares = Array.from({ length: end - first }, (_, j) => filter((first + j - center + 0.5) / scale));
    const sum = shares.reduce((a, b) => a + b, 0);
    return [first, shares.map((share) => share / sum)];
  });
}

// Rows of RGBA pixels, (height, width), with another width; columns are rows of the picture turned over.
function resizedRows(pixels, width, height, to, filter) {
  const all = taps(width, to, filter);
  const turned = new Uint8ClampedArray(4 * to * height);
  for (let y = 0; y < height; y++)
    all.forEach(([first, shares], x) => {
      for (let channel = 0; channel < 4; channel++) {
        let sum = 0;
        for (let j = 0; j < shares.length; j++) sum += shares[j] * pixels[4 * (y * width + first + j) + channel];
        turned[4 * (x * height + y) + channel] = sum;
      }
    });
  return turned;
}

// Resized, twice over: the second time puts what the first one turned over upright again.
function resized(pixels, width, height, newWidth, newHeight, filter) {
  const once = resizedRows(pixels, width, height, newWidth, filter);
  return resizedRows(once, height, newWidth, newHeight, filter);
}

export function prepared(bitmap, { resize, crop, mean, std, interpolation }) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  const { width, height } = canvas;
  const short = Math.min(width, height);
  const [newHeight, newWidth] = Array.isArray(resize)
    ? resize
    : [Math.trunc((resize * height) / short), Math.trunc((resize * width) / short)];
  const whole = context.getImageData(0, 0, width, height).data;
  const small = resized(whole, width, height, newWidth, newHeight, FILTERS[interpolation] ?? FILTERS.bilinear);
  const half = (length) => {
    const twice = length - crop; // Python rounds halves to even
    return twice % 2 ? 2 * Math.round(twice / 4) : twice / 2;
  };
  const [left, top] = [half(newWidth), half(newHeight)];
  const pixels = new Uint8ClampedArray(4 * crop * crop);
  const input = new Float32Array(3 * crop * crop);
  for (let y = 0; y < crop; y++)
    for (let x = 0; x < crop; x++) {
      const from = 4 * ((top + y) * newWidth + left + x);
      const to = y * crop + x;
      pixels.set(small.subarray(from, from + 4), 4 * to);
      for (let c = 0; c < 3; c++) input[c * crop * crop + to] = (small[from + c] / 255 - mean[c]) / std[c];
    }
  return { pixels, input };
}
